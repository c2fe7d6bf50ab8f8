"""Where the lines, points, ticks and labels of a report's plots go, in the pixels of an SVG picture.

The template of the report writes the SVG itself, so the plots follow the light or dark colours of the page, their text
is escaped like all other text, and no plotting library is needed. This module only does the arithmetic.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

Series = Mapping[str, Mapping[int, float]]  # method -> decoder block -> loss

LABEL_GAP = 15  # pixels between the baselines of two labels
LABEL_LETTERS = 13  # longer names are cut: the margin has no room for them


class Frame(NamedTuple):
    """A picture's size and the edges of its plotting area."""

    width: float
    height: float
    left: float
    right: float
    top: float
    bottom: float


FRAME = Frame(440, 290, 48, 338, 28, 248)  # with room for labels at the right
PANEL_FRAME = Frame(200, 140, 52, 192, 8, 116)


class Tick(NamedTuple):
    at: float
    text: str


class Line(NamedTuple):
    method: str
    path: str  # the attribute `d` of an SVG path


class Point(NamedTuple):
    """A dot and, in words for the tooltip, what it stands for."""

    method: str
    x: float
    y: float
    meaning: str


class Label(NamedTuple):
    method: str
    x: float
    y: float
    text: str


@dataclass(frozen=True)
class Axis:
    """Maps values onto the pixels from `start` to `stop`; `measure` takes a value to where `low` and `high` live."""

    low: float
    high: float
    start: float
    stop: float
    measure: Callable[[float], float]
    tick_values: Sequence[float]

    def __call__(self, value: float) -> float:
        share = (self.measure(value) - self.low) / (self.high - self.low)
        return round(self.start + share * (self.stop - self.start), 1)

    @property
    def ticks(self) -> list[Tick]:
        return [Tick(self(value), f"{value:g}") for value in self.tick_values]


@dataclass(frozen=True)
class Chart:
    """All that the template needs to draw one plot."""

    frame: Frame
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    lines: Sequence[Line] = ()
    points: Sequence[Point] = ()
    labels: Sequence[Label] = ()


def drawable(value: float | None) -> bool:
    """Whether a number was measured and is finite."""
    return value is not None and math.isfinite(value)


def log_axis(values: Iterable[float], start: float, stop: float) -> Axis:
    """A logarithmic axis over finite `values`. What is not positive has no logarithm: it goes to the end, marked 0."""
    values = list(values)
    logs = [math.log10(value) for value in values if value > 0]
    low, high = min(logs, default=-1.0), max(logs, default=0.0)
    margin = max(0.06 * (high - low), 0.25 - (high - low) / 2)  # half a decade at the least, or ticks are too few
    low, high = low - margin, high + margin
    ticks = log_ticks(low, high)
    if len(logs) < len(values):
        low -= 0.15 * (high - low)
        ticks = [0.0, *ticks]
    return Axis(low, high, start, stop, lambda value: math.log10(value) if value > 0 else low, ticks)


def log_ticks(low: float, high: float) -> list[float]:
    """Round numbers between 10**low and 10**high: powers of ten, thinned if many, or finer steps if these are few."""
    decades = range(math.ceil(low), math.floor(high) + 1)
    if len(decades) >= 3:
        return [float(f"1e{decade}") for decade in decades[:: math.ceil(len(decades) / 6)]]
    for steps in ((1, 2, 5), (1, 1.5, 2, 3, 5, 7)):
        around = [float(f"{step}e{decade}") for decade in range(math.floor(low), math.ceil(high)) for step in steps]
        ticks = [value for value in around if low <= math.log10(value) <= high]
        if len(ticks) >= 3:
            break
    return ticks


def block_axis(blocks: Sequence[int], start: float, stop: float, most_ticks: int) -> Axis:
    """A linear axis over decoder block numbers, with ticks at multiples of a round number."""
    low, high = min(blocks), max(blocks)
    round_numbers = (n * decade for decade in (1, 10, 100, 1000) for n in (1, 2, 5))
    step = next(step for step in round_numbers if high - low < most_ticks * step)
    ticks = [block for block in range(low, high + 1) if block % step == 0]
    margin = 0 if high > low else 1
    return Axis(low - margin, high + margin, start, stop, float, ticks)


def depth_chart(series: Series) -> Chart:
    """The loss of each method over the decoder blocks, with a dot per block and the names at the right."""
    x = block_axis(_blocks([series]), FRAME.left, FRAME.right, most_ticks=7)
    y = log_axis(_losses([series]), FRAME.bottom, FRAME.top)
    points = [
        Point(method, x(block), y(loss), f"{method}, decoder block {block}: {loss:.4g}")
        for method, losses in series.items()
        for block, loss in sorted(losses.items())
    ]
    ends = list({point.method: point for point in points}.values())  # the last point of each method
    at_margin = [end._replace(x=FRAME.right) for end in ends]
    return Chart(FRAME, x.ticks, y.ticks, _lines(series, x, y), points, labels_beside(at_margin))


def panel_charts(panels: Mapping[str, Series]) -> dict[str, Chart]:
    """A small plot per kind of layer, all with the same axes so that they compare at a glance."""
    frame, all_series = PANEL_FRAME, list(panels.values())
    y = log_axis(_losses(all_series), frame.bottom, frame.top)
    x = block_axis(_blocks(all_series), frame.left, frame.right, most_ticks=4)
    return {kind: Chart(frame, x.ticks, y.ticks, _lines(series, x, y)) for kind, series in panels.items()}


def scatter_chart(outcomes: Mapping[str, tuple[float, float]]) -> Chart:
    """Perplexity over that of the dense model against mean loss: method -> (mean loss, ratio), a named dot each."""
    x = log_axis([loss for loss, _ in outcomes.values()], FRAME.left, FRAME.right)
    y = log_axis([1.0, *(ratio for _, ratio in outcomes.values())], FRAME.bottom, FRAME.top)
    points = [
        Point(method, x(loss), y(ratio), f"{method}: mean relative loss {loss:.4g}, perplexity {ratio:.4g} × dense")
        for method, (loss, ratio) in outcomes.items()
    ]
    return Chart(FRAME, x.ticks, y.ticks, points=points, labels=labels_beside(points))


def labels_beside(points: Sequence[Point]) -> list[Label]:
    """The names of methods, each to the right of its dot and moved up or down where two would overlap."""
    heights = spread([point.y for point in points], LABEL_GAP, FRAME.top, FRAME.bottom - LABEL_GAP / 2)
    return [
        Label(point.method, round(point.x + 11, 1), round(height, 1), shortened(point.method))
        for point, height in zip(points, heights, strict=True)
    ]


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Positions near the wanted ones and in their order, `gap` apart or more, from `low` to `high` while they fit."""
    order = sorted(range(len(wanted)), key=wanted.__getitem__)
    placed = list(wanted)
    for index in order:
        placed[index] = max(placed[index], low)
        low = placed[index] + gap
    for index in reversed(order):
        placed[index] = min(placed[index], high)
        high = placed[index] - gap
    return placed


def shortened(name: str) -> str:
    """The name, cut to what fits beside a plot."""
    return name if len(name) <= LABEL_LETTERS else name[: LABEL_LETTERS - 1] + "…"


def _losses(panels: Sequence[Series]) -> list[float]:
    return [loss for series in panels for losses in series.values() for loss in losses.values()]


def _blocks(panels: Sequence[Series]) -> list[int]:
    return sorted({block for series in panels for losses in series.values() for block in losses})


def _lines(series: Series, x: Axis, y: Axis) -> list[Line]:
    """Lines over the blocks of all methods, broken where a method has no loss for a block."""
    following = dict(zip(blocks := _blocks([series]), blocks[1:], strict=False))
    return [Line(method, _path(losses, following, x, y)) for method, losses in series.items()]


def _path(losses: Mapping[int, float], following: Mapping[int, int], x: Axis, y: Axis) -> str:
    pieces, expected = [], None
    for block, loss in sorted(losses.items()):
        # A line of no length (h0) makes a piece of one point visible, as a dot.
        pieces.append(f"{'L' if block == expected else 'M'}{x(block)} {y(loss)}{'' if block == expected else 'h0'}")
        expected = following.get(block)
    return "".join(pieces)
