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

RETRIES = 10  # of a task that was killed, and starts of a worker: what dies so often dies of itself
ADDRESS = "RAY_ADDRESS"


@dataclass(frozen=True)
class Cluster:
    """How many processes hold the model, and by how many threads each of them computes."""

    workers: int
    threads: int

    def __str__(self) -> str:
        return f"workers: {self.workers}, threads of each: {self.threads} (OMP_NUM_THREADS sets them)"


@contextmanager
def joined(workers: int | None) -> Iterator[Cluster]:
    """A cluster, for as long as the context lasts; one that this process has joined or started before stays.

    A worker computes by as many threads as this process would: the order of sums may depend on them, and bits on that.

    Args:
        workers: so many processes of this machine; None is the cluster at the address in RAY_ADDRESS with as many as
            its cores allow or, without an address, this machine's cores.

    Raises:
        ConnectionError: no cluster answers there. ValueError: none of its machines has cores for so many threads.
    """
    threads, ours = torch.get_num_threads(), not ray.is_initialized()
    if ours:
        _start("local" if workers else os.environ.get(ADDRESS, "local"), workers and workers * threads)
    try:
        cores = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
        if max(cores) < threads:
            raise ValueError(
                f"a worker would compute by {threads} threads, and no machine of the cluster has more than "
                f"{max(cores)} cores: set OMP_NUM_THREADS to so many, or fewer"
            )
        yield Cluster(workers or sum(cores) // threads, threads)
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
