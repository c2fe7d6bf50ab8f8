"""Time several forms of the same layers side by side."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor, nn

DENSE_BYTES = 1 << 30  # of dense weights that are made to compare with; layers beyond are not timed
SECONDS = 0.4  # spent on each figure, about
Clock = Callable[[], float]


@dataclass(frozen=True)
class Timing:
    """A layer's time at one number of tokens.

    Args:
        shape: of the layer, with its blocks. tokens: in the input. layers: so many were timed together.
        dense: seconds of `torch.nn.Linear` in the same dtype.
        seconds: by strategy; "dense" is that of ``dense``, the same product.
        wrappers: the part of the fastest sparse strategy's time that goes to A and B; None where that is not measured.
    """

    shape: str
    tokens: int
    layers: int
    dense: float
    seconds: dict[str, float]
    wrappers: float | None

    def fastest(self, allow_dense: bool = True) -> str:
        """The strategy of least time."""
        allowed = {name: time for name, time in self.seconds.items() if allow_dense or name != "dense"}
        return min(allowed, key=allowed.__getitem__)


def time_side_by_side(
    forms: Mapping[str, Sequence[nn.Module]], x: Tensor, clock: Clock = time.perf_counter
) -> dict[str, float]:
    """Median seconds of one layer by form; forms take turns, so that a busy machine slows all of them.

    Args:
        clock: `time.process_time` counts the processor's time, which says more of one thread on a busy machine.
    """
    times: dict[str, list[float]] = {name: [] for name in forms}
    for layers in forms.values():  # compiles kernels
        _seconds(layers, x, clock)
    start = time.perf_counter()
    while min(map(len, times.values())) < 3 or time.perf_counter() - start < SECONDS * len(forms):
        for name, layers in forms.items():
            times[name].append(_seconds(layers, x, clock) / len(layers))
    return {name: median(found) for name, found in times.items()}


def _seconds(layers: Sequence[nn.Module], x: Tensor, clock: Clock) -> float:
    _wait(x.device)
    start = clock()
    for layer in layers:
        layer(x)
    _wait(x.device)
    return clock() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
