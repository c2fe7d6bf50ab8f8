"""Which workers a run asks, by what a person says."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch

from armorfact_hf.pruning.job import Job
from armorfact_hf.pruning.progress import Progress
from armorfact_hf.pruning.workers.in_process import InProcess
from armorfact_hf.pruning.workers.protocol import Workers

RAY = "ray"
Choice = str | int | None


def check_workers(choice: Choice, device: torch.device | None = None) -> None:
    """Refuse workers that cannot be had, before any work.

    Args:
        choice: None is this process, a number is so many processes of this machine, "ray" is what `joined` finds.
        device: of the model, once it is known.

    Raises:
        ValueError: another choice, or a model that is not on a CPU. ImportError: Ray is not installed.
    """
    if choice is None:
        return
    if choice != RAY and not (str(choice).isdecimal() and int(choice)):
        raise ValueError(f"workers must be 'ray' or a number of processes, 1 or more, got {choice!r}")
    if find_spec(RAY) is None:
        raise ImportError("workers in other processes need Ray: pip install 'armorfact[ray]', or leave --workers out")
    if device is not None and device.type != "cpu":
        raise ValueError(
            f"the model is on {device}, and workers in other processes compute on CPUs: take --device cpu, or leave "
            "--workers out"
        )


@contextmanager
def hired(choice: Choice, job: Job, progress: Progress) -> Iterator[Workers[Any]]:
    """The workers of a job, before its first block.

    Raises:
        ValueError, ImportError: see `check_workers`. ConnectionError: no cluster answers.
    """
    check_workers(choice, job.model.device)
    if choice is None:
        yield InProcess.of(job, progress)
        return
    from armorfact_hf.pruning.workers.on_ray import OnRay

    with OnRay.of(job, progress, None if choice == RAY else int(choice)) as workers:
        yield workers
