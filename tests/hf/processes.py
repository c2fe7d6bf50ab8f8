"""Processes of their own, forked from one that has imported everything and computed nothing: they start at once."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

PRELOADED = [
    "transformers.models.llama.modeling_llama",
    "armorfact_hf.runs.prune_to_folder",
    "armorfact_hf.runs.compare",
]
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(PRELOADED)


def begin(act: Callable[..., Any], *arguments: Any, says: Path | None = None) -> multiprocessing.Process:
    """Start a function of a module in a process of its own; what it prints goes to the file ``says``."""
    process = _FORKS.Process(target=_run, args=(act, arguments, says))
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)):
        process.start()
    return process


def exit_code(process: multiprocessing.Process) -> int | None:
    """How a process ends; None if it takes longer than a minute, after which it is killed."""
    process.join(60)
    code = process.exitcode
    process.kill()
    return code


def _run(act: Callable[..., Any], arguments: tuple[Any, ...], says: Path | None) -> None:
    import torch
    from transformers.utils import logging

    torch.set_num_threads(1)
    logging.disable_progress_bar()
    if says is not None:
        descriptor = os.open(says, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
    act(*arguments)
