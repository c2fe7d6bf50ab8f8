"""What pruning cost, method by method: a model pruned in several ways, and the table of all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from armorfact_hf.checkpoint.folder import stored_tensors
from armorfact_hf.data.calibration import Calibration
from armorfact_hf.data.load_model import Loaded
from armorfact_hf.data.texts import check_name
from armorfact_hf.evaluation.measure import Evaluation, check_text
from armorfact_hf.model.structure import Select
from armorfact_hf.observer import Observer
from armorfact_hf.pruning.config import PruneConfig
from armorfact_hf.pruning.fitting import fitting_layers
from armorfact_hf.pruning.workers.choice import Choice, check_workers
from armorfact_hf.report.record import PerplexityRecord, Report
from armorfact_hf.runs.evaluate import evaluate_folder
from armorfact_hf.runs.finish import refuse_unfinished
from armorfact_hf.runs.load_to_prune import fits_whole, load_to_prune
from armorfact_hf.runs.prune_to_folder import checked_job, prune_to_folder


@dataclass(frozen=True)
class Row:
    """A line of the table that compares the dense model and what became of it.

    Args:
        name: "dense", or a method.
        perplexity: by text. ratio: of those to the dense model's.
        mean_loss: mean relative loss over the pruned layers.
        bytes: of all tensors on disk. seconds: that pruning took.
    """

    name: str
    perplexity: dict[str, float]
    ratio: dict[str, float]
    mean_loss: float
    bytes: int
    seconds: float


def rows(folder: Path, beside: Sequence[Path] = ()) -> list[Row]:
    """The table of an evaluated folder: its dense model, the folders ``beside``, then the folder itself."""
    reports = {path: Report.read(path) for path in (*beside, folder)}
    methods = {report.config.method for report in reports.values()}
    own = reports[folder]
    records = _labelled([x for x in own.evaluations if methods <= {method.name for method in x.methods}])
    dense = {label: record.dense for label, record in records.items()}
    pruned = [_row(path, report, records) for path, report in reports.items()]
    return [Row("dense", dense, dict.fromkeys(dense, 1.0), 0.0, own.model.bytes, 0.0), *pruned]


def _labelled(records: Sequence[PerplexityRecord]) -> dict[str, PerplexityRecord]:
    """The records by the names of their texts; those of the same name are told apart by what is in them."""
    texts = [name for name, _ in {(record.text, record.sha256) for record in records}]
    return {
        record.text if texts.count(record.text) == 1 else f"{record.text} {record.sha256[:6]}": record
        for record in records
    }


def _row(folder: Path, report: Report, records: dict[str, PerplexityRecord]) -> Row:
    name = report.config.method
    found = {
        label: next(method.perplexity for method in record.methods if method.name == name)
        for label, record in records.items()
    }
    ratio = {label: value / records[label].dense for label, value in found.items()}
    size = sum(tensor.nbytes for _, tensor in stored_tensors(folder))
    return Row(name, found, ratio, report.mean_loss(), size, report.totals.seconds)


def _the_same_layers(loaded: Loaded, config: PruneConfig, other: PruneConfig) -> tuple[PruneConfig, Select]:
    """Settings and a choice of layers that prune by ``other`` what ``config`` prunes: no block has to fit there."""
    layers, _ = fitting_layers(loaded.model, config)
    names = {layer.name for layer in layers}
    head = other.head and any(layer.decoder_block is None for layer in layers)
    return replace(other, head=head), lambda name, _: name in names


def compare(
    model: Path | str,
    out: Path | str,
    config: PruneConfig,
    methods: Sequence[str],
    calibration: Calibration,
    evaluations: Sequence[Evaluation],
    *,
    dtype: str = "auto",
    device: str | None = None,
    stream: bool | None = None,
    states: str = "auto",
    observer: Observer | None = None,
    workers: Choice = None,
) -> list[Row]:
    """Prune a model by ``config`` into ``out`` and by other methods into folders beside it, and measure all alike.

    What is finished already is reused.

    Args:
        model, dtype, device: see `load_model`. stream, states: see `prune_to_folder`.
        methods: of one shot; each goes to the folder ``<out>-<method>``.
        evaluations: left out, with a sentence, where the dense model does not fit into memory.
        observer: is told how it goes; prints sentences by default.
        workers: see `prune_`.
    """
    check_workers(workers)
    model, out, observer = str(model), Path(out), Observer() if observer is None else observer
    for evaluation in evaluations:
        check_name(evaluation.text)
    beside = {method: out.with_name(f"{out.name}-{method}") for method in methods if method != config.method}
    for folder in beside.values():
        refuse_unfinished(folder)
    for place, (method, folder) in enumerate({**beside, config.method: out}.items()):
        observer.say(f"Pruning {model} by {method}, into {folder}.")
        # What the others would be compared with on every layer stands in the report of the chosen method already.
        chosen = config if folder == out else config.in_one_shot(method)
        loaded = load_to_prune(
            model,
            chosen,
            calibration,
            stream=stream,
            dtype=dtype,
            device=device,
            observer=observer,
            states=states,
            workers=workers,
        )
        if place == 0:  # all that may be wrong is told before any work, and the first model that is there tells it
            for evaluation in evaluations:
                check_text(loaded, evaluation, observer.say)
            checked_job(loaded, out, config, calibration, observer, None, states, workers)
        select = None
        if folder != out:
            chosen, select = _the_same_layers(loaded, config, chosen)
        whole = fits_whole(loaded)  # while its layers are the dense ones
        prune_to_folder(
            loaded, folder, chosen, calibration, select=select, states=states, observer=observer, workers=workers
        )
        del loaded
    if evaluations and not whole:
        observer.say(f"Perplexity is not measured: {model} does not fit into memory; `armorfact eval {out}` does it.")
    elif evaluations:
        evaluate_folder(out, evaluations, device=device, beside=list(beside.values()), observer=observer)
    return rows(out, list(beside.values()))
