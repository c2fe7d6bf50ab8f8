"""Scatter plots of the KL divergence against the proxies, in the style of the report, as one SVG file a model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from armorfact_hf.files import written_beside
from armorfact_hf.report.plots import Frame, Tick, log_axis
from benchmarks.evidence.tables import Points, kind

SHOWN = ("H", "H~", "G-H", "G-H~")
SCALES = {"relative": "relative loss in {}", "predicted": "KL foretold by {}, nats a token"}
FRAME = Frame(250, 220, 46, 240, 24, 180)


def write_plots(folder: Path, name: str, figures: dict[str, Any], methods: Sequence[str]) -> None:
    """Write ``<name>-relative.svg`` and ``<name>-predicted.svg``, a panel for each of four proxies."""
    folder.mkdir(parents=True, exist_ok=True)
    for scale in SCALES:
        with written_beside(folder / f"{name}-{scale}.svg") as draft:
            draft.write_text(drawing(figures, methods, scale), encoding="utf-8")


def drawing(figures: dict[str, Any], methods: Sequence[str], scale: str) -> str:
    """The SVG source: all panels on the same axes, so that they compare at a glance."""
    points = Points(figures, methods)
    values = {proxy: getattr(points, scale)(proxy) for proxy in SHOWN}
    x = log_axis([value for each in values.values() for value in each], FRAME.left, FRAME.right)
    y = log_axis(points.kl, FRAME.bottom, FRAME.top)
    panels = [
        {
            "title": SCALES[scale].format(proxy),
            "dots": [
                {"x": x(value), "y": y(kl), "method": methods.index(method), "meaning": f"{method}, {kind(layer)}"}
                for value, kl, (layer, method) in zip(values[proxy], points.kl, points.keys, strict=True)
            ],
        }
        for proxy in SHOWN
    ]
    ends = [max(x.low, y.low), min(x.high, y.high)]
    exact = [(x(10**end), y(10**end)) for end in ends] if scale == "predicted" and ends[0] < ends[1] else None
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.get_template("scatter.svg.j2")
    return template.render(
        panels=panels, methods=methods, frame=FRAME, x_ticks=apart(x.ticks), y_ticks=y.ticks, exact=exact
    )


def apart(ticks: Sequence[Tick], gap: float = 38) -> list[Tick]:
    """The ticks whose labels have room beside those before them."""
    kept: list[Tick] = []
    for tick in ticks:
        if not kept or tick.at - kept[-1].at >= gap:
            kept.append(tick)
    return kept
