"""The parts of a run, most informative first, and how one of them is measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib import import_module

from benchmarks.gpu.report import FAILED, SKIPPED, Figure, Labels, Skipped, Values
from benchmarks.gpu.setup import SWEEPS, Setup

Item = tuple[Labels, Callable[[], Values]]  # what is going to be measured, and the work that does it


@dataclass(frozen=True)
class Part:
    """A part of the run.

    Args:
        name: of the part. share: of all the seconds that it may take.
        function: "module:function" in this folder; gives the items, one after another.
        given: what the function is given before the setup.
    """

    name: str
    share: float
    function: str
    given: tuple[str | int, ...] = ()

    def items(self, setup: Setup) -> Iterator[Item]:
        """The items; what they need is imported now."""
        module, name = self.function.split(":")
        return partial(getattr(import_module(f"benchmarks.gpu.{module}"), name), *self.given)(setup)


SWEEP, LARGE_SWEEP, BLOCK, SWEPT_BLOCK = "sweep", "large sweep", "block without sweeps", "block"

PARTS = {
    part.name: part
    for part in (
        Part("tests", 0.2, "checks:checks"),
        Part("packed", 0.08, "execution:eager", ("packed",)),
        Part("semi_structured", 0.08, "execution:eager", ("semi_structured",)),
        Part("unpacked", 0.08, "execution:eager", ("unpacked",)),
        Part("dense", 0.08, "execution:eager", ("dense",)),
        Part("graphs", 0.1, "execution:graphs"),
        Part(SWEEP, 0.25, "solver:sweeps", ("sweeps",)),
        Part("sparsegpt", 0.1, "solver:greedy"),
        Part("matching", 0.12, "block:matching"),
        Part(BLOCK, 0.25, "block:pruned", (0,)),
        Part(LARGE_SWEEP, 0.6, "solver:sweeps", ("large",)),
        Part("cupy", 0.1, "solver:cupy_sweep"),
        Part(SWEPT_BLOCK, 1.0, "block:pruned", (SWEEPS,)),
    )
}


def measured(name: str, setup: Setup) -> Iterator[Figure]:
    """The figures of a part; one that fails does not take the others with it, unless it takes the device."""
    try:
        for labels, work in PARTS[name].items(setup):
            figure = _figure(name, labels, work)
            yield figure
            if figure.status == FAILED and (reason := _lost(setup.device)):
                yield Figure(name, {}, {}, FAILED, f"ended, since the device answers no more: {reason}")
                return
    except Exception as error:
        yield _without(name, {}, error)


def _figure(part: str, labels: Labels, work: Callable[[], Values]) -> Figure:
    try:
        return Figure(part, labels, work())
    except Exception as error:
        return _without(part, labels, error)


def _without(part: str, labels: Labels, error: Exception) -> Figure:
    if isinstance(error, ModuleNotFoundError):
        return Figure(part, labels, {}, SKIPPED, f"{error.name} is not installed")
    if isinstance(error, Skipped):
        return Figure(part, labels, {}, SKIPPED, str(error))
    first = next(iter(str(error).splitlines()), "")
    return Figure(part, labels, {}, FAILED, f"{type(error).__name__}: {first}")


def _lost(device: str) -> str:
    """How the device fails after an error, which on CUDA may outlive the kernel that made it; nothing if it works."""
    import torch

    if torch.device(device).type != "cuda":
        return ""
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return ""
