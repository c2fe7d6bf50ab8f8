"""Which workers a run asks, by what a person says."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from armorfact_hf.pruning.job import Job
from armorfact_hf.pruning.progress import Progress
from armorfact_hf.pruning.workers.in_process import InProcess
from armorfact_hf.pruning.workers.protocol import Workers

RAY, ADDRESS = "ray", "RAY_ADDRESS"
Choice = str | int | None


def check_workers(choice: Choice, job: Job | None = None) -> None:
    """Refuse workers that cannot be had, before any work.

    Args:
        choice: None is this process, a number is so many processes of this machine, "ray" is what `joined` finds.
        job: what they are to do, once it is known.

    Raises:
        ValueError: another choice, or a job that cannot be handed on. ImportError: Ray is not installed.
    """
    if choice is None:
        return
    if choice != RAY and not (str(choice).isdecimal() and int(choice)):
        raise ValueError(f"workers must be 'ray' or a number of processes, 1 or more, got {choice!r}")
    if find_spec(RAY) is None:
        raise ImportError("workers in other processes need Ray: pip install 'armorfact[ray]', or leave --workers out")
    if job is not None and (reason := _stays_here(job)):
        raise ValueError(f"{reason}, or leave --workers out")


def _stays_here(job: Job) -> str:
    """Why other processes cannot do a job, and the way out; empty if they can."""
    device = job.weights.device
    if device.type not in ("cpu", "cuda"):
        return f"the model is on {device}, and workers compute on CPUs or on CUDA devices: take --device cpu"
    if device.index:
        return f"the model is on {device}, and each worker is shown one GPU, as cuda:0: take --device cuda"
    if job.states != "auto":
        return "with workers, states wait in Ray's object store, which goes to disk by itself: leave --states out"
    if job.experts_at_once is not None:
        return "with workers, statistics wait in Ray's object store, of all experts: leave experts_at_once out"
    return ""


def count_of(choice: Choice) -> int | None:
    """How many workers that is; None where a cluster says it."""
    return None if choice in (None, RAY) else int(choice)


def count_here(choice: Choice, device: torch.device) -> int | None:
    """How many workers this machine will have, before they are hired; None where a cluster says it, or of none."""
    if choice != RAY or ADDRESS in os.environ:
        return count_of(choice)
    if device.type == "cuda":
        return torch.cuda.device_count()
    return max((os.cpu_count() or 1) // torch.get_num_threads(), 1)


def gpu_share(workers: int, gpus: int) -> float:
    """What part of a GPU each worker asks Ray for, so that all of them are placed; 0 without GPUs.

    Each is shown one GPU, which is cuda:0 to it: as many workers have one as there are, and more share them evenly.

    >>> gpu_share(2, 4), gpu_share(4, 4), gpu_share(5, 4), gpu_share(4, 0)
    (1.0, 1.0, 0.5, 0.0)
    """
    return 1 / -(-workers // gpus) if gpus else 0.0


@contextmanager
def hired(choice: Choice, job: Job, progress: Progress, folder: Path | None = None) -> Iterator[Workers[Any]]:
    """The workers of a job, before its first block; in this process, states wait in ``folder`` if there is one.

    Raises:
        ConnectionError: no cluster answers.
    """
    if choice is None:
        yield InProcess.of(job, progress, folder)
        return
    from armorfact_hf.pruning.workers.on_ray import OnRay

    with OnRay.of(job, progress, count_of(choice)) as workers:
        yield workers
