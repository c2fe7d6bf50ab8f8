"""A report as a page to read: one file that loads nothing else."""

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from armorfact_hf.files import written_beside
from armorfact_hf.pruning.layer import LayerReport
from armorfact_hf.report.plots import Chart, Series, depth_chart, drawable, panel_charts, scatter_chart
from armorfact_hf.report.record import FILE, PerplexityRecord, Report
from armorfact_hf.typed_json import to_json

PAGE = "report.html"
MOST_PANELS = 12  # more kinds of layers than these are not drawn one by one: nobody would read that picture


@dataclass(frozen=True)
class LossRow:
    """One method's losses: on how many layers they were measured, their mean, and the worst with its layer."""

    method: str
    layers: int
    mean: float
    worst: float
    worst_layer: str


@dataclass(frozen=True)
class Contest:
    """On how many layers the stored method was compared with others, and on how many none of them has a lower loss."""

    compared: int
    won: int


@dataclass(frozen=True)
class MethodRow:
    """One method in the table of a text."""

    name: str
    mean_loss: float | None
    perplexity: float
    ratio: float | None


@dataclass(frozen=True)
class EvaluationView:
    """A text: its record, a row for each method, that of the stored one, the plot, and which methods it lacks."""

    record: PerplexityRecord
    rows: list[MethodRow]
    stored: MethodRow | None
    plot: Chart | None
    undrawn: list[str]


def write_report(report: Report, folder: Path) -> None:
    """Write `report.json` and `report.html` into an existing folder, each beside its target and then renamed."""
    page = render_html(report)
    for name, text in ((FILE, json.dumps(to_json(report), indent=1) + "\n"), (PAGE, page)):
        with written_beside(folder / name) as draft:
            draft.write_text(text, encoding="utf-8", errors="backslashreplace")  # a name may hold a lone surrogate


def render_html(report: Report) -> str:
    """The page for one run; whatever text the report holds is escaped."""
    layers, stored, methods = report.layers, report.config.method, method_names(report)
    return _TEMPLATES.get_template("page.html.j2").render(
        report=report,
        config=report.config.to_dict(),
        stored=stored,
        methods=methods,
        slots={method: index for index, method in enumerate(methods)},
        wrapped=any(layer.block for layer in layers),
        measured=[method for method in methods if any(method in layer.losses for layer in layers)],
        losses=loss_summary(layers, methods),
        contest=contest(layers, stored),
        outside=[layer.name for layer in layers if layer.decoder_block is None],
        statuses=Counter(layer.status for layer in layers),
        notes=layers_by_note(layers),
        evaluations=[evaluation_view(record, stored) for record in report.evaluations],
        depth=depth_plot(layers, methods),
        panels=panel_plots(layers, methods),
    )


def method_names(report: Report) -> list[str]:
    """Every method that the report names, the stored one first; the place of a method gives its colour."""
    measured = [method for layer in report.layers for method in layer.losses]
    evaluated = [method.name for record in report.evaluations for method in record.methods]
    return list(dict.fromkeys([report.config.method, *measured, *evaluated]))


def loss_summary(layers: Sequence[LayerReport], methods: Iterable[str]) -> list[LossRow]:
    """A row for each method with a finite loss for some layer."""
    rows = []
    for method in methods:
        losses = {layer.name: layer.losses[method] for layer in layers if drawable(layer.losses.get(method))}
        if losses:
            worst = max(losses, key=losses.__getitem__)
            rows.append(LossRow(method, len(losses), fmean(losses.values()), losses[worst], worst))
    return rows


def lowest(losses: Mapping[str, float]) -> float | None:
    """The lowest finite loss, or None."""
    return min(filter(drawable, losses.values()), default=None)


def contest(layers: Iterable[LayerReport], stored: str) -> Contest:
    """How the stored method did against the others, layer by layer."""
    compared = [layer.losses for layer in layers if stored in layer.losses and len(layer.losses) > 1]
    return Contest(len(compared), sum(losses[stored] == lowest(losses) for losses in compared))


def layers_by_note(layers: Iterable[LayerReport]) -> dict[str, list[str]]:
    """The layers that carry each note, so that what happened to all of them is told once."""
    found = defaultdict(list)
    for layer in layers:
        for note in layer.notes:
            found[note].append(layer.name)
    return dict(found)


def evaluation_view(record: PerplexityRecord, stored: str) -> EvaluationView:
    """A text with the ratios to the dense model, what the stored method reached, and its plot."""
    rows = [MethodRow(x.name, x.mean_loss, x.perplexity, ratio(x.perplexity, record.dense)) for x in record.methods]
    outcomes = {
        row.name: (row.mean_loss, row.ratio)
        for row in rows
        if row.mean_loss is not None and row.ratio is not None and drawable(row.mean_loss) and drawable(row.ratio)
    }
    return EvaluationView(
        record=record,
        rows=rows,
        stored=next((row for row in rows if row.name == stored), None),
        plot=scatter_chart(outcomes) if outcomes else None,
        undrawn=[row.name for row in rows if row.name not in outcomes],
    )


def depth_plot(layers: Iterable[LayerReport], methods: Iterable[str]) -> Chart | None:
    """Loss over depth, the mean of each decoder block; None if no layer lies in a decoder block."""
    series = mean_losses(layers, methods)
    return depth_chart(series) if series else None


def panel_plots(layers: Iterable[LayerReport], methods: Iterable[str]) -> dict[str, Chart]:
    """Loss over depth for each kind of layer, at most `MOST_PANELS` of them; none if there is only one kind."""
    kinds = defaultdict(list)
    for layer in layers:
        kinds[layer.name.rpartition(".")[2]].append(layer)
    drawn = {kind: series for kind, members in kinds.items() if (series := mean_losses(members, methods))}
    return panel_charts(drawn) if 1 < len(drawn) <= MOST_PANELS else {}


def mean_losses(layers: Iterable[LayerReport], methods: Iterable[str]) -> Series:
    """method -> decoder block -> the mean over its layers that have a finite loss; what has none is left out."""
    found: dict[str, dict[int, list[float]]] = {method: defaultdict(list) for method in methods}
    for layer in layers:
        for method, loss in layer.losses.items():
            if drawable(loss) and layer.decoder_block is not None:
                found[method][layer.decoder_block].append(loss)
    return {
        method: {block: fmean(losses) for block, losses in blocks.items()} for method, blocks in found.items() if blocks
    }


def ratio(part: float | None, whole: float | None) -> float | None:
    """`part` over `whole`, or None if either is unknown or `whole` is 0."""
    return part / whole if part is not None and whole else None


def shown(value: float | None, form: str = ",d") -> str:
    """A number in a format, or a dash if it is unknown."""
    return "–" if value is None else format(value, form)


def counted(number: int, noun: str) -> str:
    """A number of things, in words."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def size(count: int | None) -> str:
    """A number of bytes in a unit that suits it; the space does not break."""
    if count is None or count < 1000:
        return f"{shown(count)}\xa0bytes"
    units = ("kB", "MB", "GB", "TB")
    power = min((len(str(count)) - 1) // 3, len(units))
    return f"{count / 1000**power:.4g}\xa0{units[power - 1]}"


def duration(seconds: float | None) -> str:
    """Seconds in words; the spaces do not break."""
    if seconds is None or seconds < 60:
        return f"{shown(seconds, '.1f')}\xa0s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}\xa0min\xa0{rest}\xa0s" if minutes < 60 else f"{minutes // 60}\xa0h\xa0{minutes % 60}\xa0min"


def setting(value: Any) -> str:
    """A value of the configuration: text as it is, all else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def breakable(name: str) -> Markup:
    """A dotted name, escaped, that may go on in a new line after each dot."""
    return Markup(".<wbr>").join(name.split("."))


def _filters() -> Iterator[tuple[str, Any]]:
    yield "loss", lambda value: shown(value, "#.4g") if value else shown(value, "g")
    yield "perplexity", lambda value: shown(value, ",.2f")
    yield "share", lambda value: shown(value, ".3f")
    yield "percent", lambda value: shown(value, ".1%")
    yield from ((word.__name__, word) for word in (shown, counted, size, duration, setting, breakable))


_TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_TEMPLATES.filters.update(_filters())
_TEMPLATES.globals.update(ratio=ratio, lowest=lowest)
