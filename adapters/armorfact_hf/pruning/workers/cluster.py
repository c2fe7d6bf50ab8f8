"""Processes of this machine or of many, through Ray."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
import torch
from ray.exceptions import RayError, RayTaskError

from armorfact_hf.pruning.workers.choice import ADDRESS, gpu_share

RETRIES = 10  # of a task that was killed, and starts of a worker: what dies so often dies of itself


@dataclass(frozen=True)
class Cluster:
    """How many processes hold the model, by how many threads each of them computes, and on how many GPUs, if on any."""

    workers: int
    threads: int
    gpus: int = 0

    @property
    def share(self) -> float:
        """Of a GPU, that a worker asks for."""
        return gpu_share(self.workers, self.gpus)

    def __str__(self) -> str:
        on = f", GPUs: {self.gpus}" if self.gpus else ""
        return f"workers: {self.workers}, threads of each: {self.threads} (OMP_NUM_THREADS sets them){on}"


@contextmanager
def joined(workers: int | None, on_gpus: bool = False) -> Iterator[Cluster]:
    """A cluster, for as long as the context lasts; one that this process has joined or started before stays.

    A worker computes by as many threads as this process would: the order of sums may depend on them, and bits on that.

    Args:
        workers: so many processes of this machine; None is the cluster at the address in RAY_ADDRESS with as many as
            its cores allow or, without an address, this machine's cores.
        on_gpus: whether they compute on GPUs, each on one; None is as many workers as there are GPUs then.

    Raises:
        ConnectionError: no cluster answers there. ValueError: none of its machines has cores for so many threads, or a
            GPU where they are asked for.
    """
    threads, ours = torch.get_num_threads(), not ray.is_initialized()
    if ours:
        _start("local" if workers else os.environ.get(ADDRESS, "local"), workers and workers * threads)
    try:
        cores, gpus = (
            [int(node["Resources"].get(kind, 0)) for node in ray.nodes() if node["Alive"]] for kind in ("CPU", "GPU")
        )
        if max(cores) < threads:
            raise ValueError(
                f"a worker would compute by {threads} threads, and no machine of the cluster has more than "
                f"{max(cores)} cores: set OMP_NUM_THREADS to so many, or fewer"
            )
        if on_gpus and not sum(gpus):
            raise ValueError("the model is on a GPU, and no machine of the cluster has one: take --device cpu")
        yield Cluster(workers or (sum(gpus) if on_gpus else sum(cores) // threads), threads, sum(gpus) * on_gpus)
    finally:
        if ours:
            ray.shutdown()


def _start(address: str, cores: int | None) -> None:
    local = {"num_cpus": cores, "include_dashboard": False} if address == "local" else {}
    before = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **local)
    finally:
        if signal.getsignal(signal.SIGTERM) is not before:  # Ray's own handler ends the program before it cleans up
            signal.signal(signal.SIGTERM, before)


@contextmanager
def plain_errors() -> Iterator[None]:
    """What failed in another process is raised as it would be in this one.

    Raises:
        RuntimeError: processes died again and again.
    """
    try:
        yield
    except RayTaskError as error:
        raise error.cause from None
    except RayError as error:
        first = str(error).strip().partition("\n")[0]
        raise RuntimeError(
            f"a worker died {RETRIES} times, or could not be started ({type(error).__name__}: {first}): out of memory? "
            "What is finished is kept; fewer workers, or none, continue from there"
        ) from error


def get(refs: Any) -> Any:
    """`ray.get`, with `plain_errors`."""
    with plain_errors():
        return ray.get(refs)
