"""The figures of a run as Markdown, as docs/benchmarks.md takes them in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from benchmarks.gpu.parts import BLOCK, LARGE_SWEEP, PARTS, SWEEP
from benchmarks.gpu.report import Figure, Report, number
from benchmarks.gpu.setup import BLOCKS, SWEEPS, Setup, Shape, shape_name


def tables(report: Report) -> str:
    """A table for every part with figures, what is lacking and why, and the time of a whole model."""
    machine = ", ".join(f"{name} {value}" for name, value in report.machine.items() if value)
    parts = [_part(name, list(report.of_part(name))) for name in PARTS]
    return "\n\n".join(filter(None, [machine, *parts, extrapolation(report)]))


def _part(name: str, figures: list[Figure]) -> str:
    table = "\n".join(_rows([figure for figure in figures if figure.values]))
    lacking = "\n".join(f"- {figure}" for figure in figures if not figure.values)
    return "\n\n".join(filter(None, [f"### {name}", table, lacking])) if figures else ""


def _rows(figures: Sequence[Figure]) -> Iterator[str]:
    labels = list(dict.fromkeys(label for figure in figures for label in figure.of))
    values = list(dict.fromkeys(value for figure in figures for value in figure.values))
    if figures:
        yield _row([*labels, *values])
        yield "|" + "---|" * (len(labels) + len(values))
    for figure in figures:
        found = [number(figure.values[name]) if name in figure.values else "" for name in values]
        yield _row([*(str(figure.of.get(name, "")) for name in labels), *found])


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


@dataclass(frozen=True)
class Prediction:
    """Of a decoder block at the default number of sweeps.

    Args:
        seconds: that it takes. assumed: the shapes of which no sweep was measured.
    """

    seconds: float
    assumed: tuple[str, ...]


def swept_block(report: Report) -> Prediction | None:
    """What a block takes without sweeps, and the sweeps of its layers; None where too little was measured.

    A sweep goes along d_in step by step. So one that was not measured takes at least as long as one over the square
    layer, in proportion to d_in: every step has as many rows or more, and the products grow faster.
    """
    setup = Setup(hidden=report.settings["hidden"], inner=report.settings["inner"])
    square = setup.hidden, setup.hidden
    without, least = report.value((BLOCK,), 0, "block s"), _sweep_seconds(report, square)
    if without is None or least is None:
        return None
    total, assumed = without, list[str]()
    for shape, count in setup.linear_layers.items():
        found = _sweep_seconds(report, shape)
        if found is None:
            found, assumed = least * shape[1] / setup.hidden, [*assumed, shape_name(shape)]
        total += SWEEPS * count * found
    return Prediction(total, tuple(assumed))


def _sweep_seconds(report: Report, shape: Shape) -> float | None:
    return report.value((SWEEP, LARGE_SWEEP), shape_name(shape), "sweep s")


def extrapolation(report: Report) -> str:
    """The time of a model of 32 such blocks, in a sentence; nothing where it cannot be told."""
    found = swept_block(report)
    if found is None:
        return ""
    least = "at least " if found.assumed else ""
    sentence = (
        f"From these: a block at {SWEEPS} sweeps a layer takes {least}{number(found.seconds)} s, and {BLOCKS} of them "
        f"{number(BLOCKS * found.seconds / 3600)} h."
    )
    return f"{sentence} Not measured: a sweep of {', '.join(found.assumed)}." if found.assumed else sentence
