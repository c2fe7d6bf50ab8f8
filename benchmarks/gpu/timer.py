"""How long work takes: by CUDA's events on a GPU, by the clock on a CPU."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Protocol

import torch

Work = Callable[[], object]


class Timer(Protocol):
    """Times one call."""

    def seconds(self, work: Work) -> float:
        """How long the call takes until its results are there."""


class CpuTimer:
    """The clock of the machine."""

    def seconds(self, work: Work) -> float:
        """Wall time."""
        start = time.perf_counter()
        work()
        return time.perf_counter() - start


class CudaTimer:
    """Events in the current stream, before the call and behind all that it queued."""

    def seconds(self, work: Work) -> float:
        """The time between the events; pauses of the GPU while it waits for Python count."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        work()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3


def timer_of(device: str) -> Timer:
    """The timer for work on a device."""
    return CudaTimer() if torch.device(device).type == "cuda" else CpuTimer()


def medians(timer: Timer, works: Mapping[str, Work], seconds: float, least: int = 5) -> dict[str, float]:
    """Median seconds of each work, after a warm-up; they take turns, so that a busy machine slows all of them.

    Args:
        seconds: spent on each work, about. least: measurements of each, at least.
    """
    for work in works.values():
        timer.seconds(work)
    times: dict[str, list[float]] = {name: [] for name in works}
    start = time.perf_counter()
    while min(map(len, times.values())) < least or time.perf_counter() - start < seconds * len(works):
        for name, work in works.items():
            times[name].append(timer.seconds(work))
    return {name: median(found) for name, found in times.items()}
