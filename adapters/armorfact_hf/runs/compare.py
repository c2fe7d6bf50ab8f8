"""What pruning cost: perplexity and tasks of finished folders, always beside those of their dense model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from armorfact_hf.checkpoint.folder import stored_tensors
from armorfact_hf.data.load_model import Loaded, Log, load_model
from armorfact_hf.data.origin import CARD
from armorfact_hf.data.texts import check_name
from armorfact_hf.evaluation.measure import Evaluation, MeasuredPerplexity, check_text, perplexity_of
from armorfact_hf.evaluation.tasks import TaskScore, check_request, evaluate_tasks
from armorfact_hf.layers.stack import PRUNED
from armorfact_hf.model.structure import Select
from armorfact_hf.observer import Observer
from armorfact_hf.pruning.config import PruneConfig
from armorfact_hf.pruning.fitting import fitting_layers
from armorfact_hf.pruning.workers.choice import Choice, check_workers
from armorfact_hf.report.card import write_card
from armorfact_hf.report.record import MethodPerplexity, PerplexityRecord, Report, TaskRecord
from armorfact_hf.runs.load_to_prune import fits_whole, load_to_prune
from armorfact_hf.runs.prune_to_folder import Calibration, checked_job, prune_to_folder


@dataclass(frozen=True)
class Figures:
    """What was measured: perplexities by text, and accuracies by task."""

    evaluations: tuple[PerplexityRecord, ...]
    tasks: tuple[TaskRecord, ...]


def dense_model(report: Report, device: str | None = None, log: Log = print) -> Loaded:
    """The dense model that a report's folder was pruned from.

    Raises:
        ValueError: it cannot be loaded, or is another one by now.
    """
    facts = report.model
    loaded = load_model(facts.name, dtype=facts.dtype, device=device, log=log)
    refuse_changed(loaded, facts.fingerprint)
    return loaded


def refuse_changed(loaded: Loaded, fingerprint: str) -> None:
    """Raise ValueError if a dense model is no longer the one of that fingerprint, which was pruned."""
    if loaded.fingerprint != fingerprint:
        raise ValueError(f"{loaded.name} is not the model that was pruned: its weights have changed since")


def evaluate_folder(
    folder: Path,
    evaluations: Sequence[Evaluation] = (Evaluation(),),
    tasks: Sequence[str] = (),
    limit: int | None = None,
    *,
    device: str | None = None,
    beside: Sequence[Path] = (),
    observer: Observer | None = None,
) -> Report:
    """Measure a finished folder beside its dense model, and write the figures into its report and its model card.

    Figures of other methods on the same texts stay there. One model is in memory at a time.

    Args:
        folder: what `prune_to_folder` wrote.
        evaluations: texts for perplexity. tasks, limit: see `evaluate_tasks`.
        device: see `load_model`.
        beside: folders of the same model, whose figures are put into the report as well.
        observer: is told how it goes; prints sentences by default.
    """
    observer = Observer() if observer is None else observer
    report = Report.read(folder)
    _check_beside(report, beside)
    for evaluation in evaluations:
        check_name(evaluation.text)
    if tasks:
        check_request(tasks, limit)
    dense = evaluate_dense(dense_model(report, device, observer.say), evaluations, tasks, limit, observer=observer)
    others = [_measured(path, evaluations, (), None, device, observer).perplexities for path in beside]
    own = _measured(folder, evaluations, tasks, limit, device, observer)
    report = Report.read(folder).merged(  # with what others have measured meanwhile
        [
            replace(record, methods=tuple(methods))
            for record, *methods in zip(dense.evaluations, *others, own.perplexities, strict=True)
        ],
        [
            replace(record, pruned=score.accuracy, standard_error=score.standard_error)
            for record, score in zip(dense.tasks, own.scores, strict=True)
        ],
    )
    report.write(folder)
    if not write_card(folder):
        observer.say(f"{folder / CARD} was edited by hand: it is left as it is, without the new figures.")
    return report


def _check_beside(report: Report, beside: Sequence[Path]) -> None:
    methods = [report.config.method]
    for path in beside:
        other = Report.read(path)
        if other.model.fingerprint != report.model.fingerprint:
            raise ValueError(f"{path} was pruned from another model ({other.model.name}): leave it out")
        methods.append(other.config.method)
    if len(set(methods)) < len(methods):
        raise ValueError(f"expected folders by different methods side by side, got {', '.join(methods)}")


@dataclass(frozen=True)
class _Measured:
    perplexities: list[MethodPerplexity]
    scores: list[TaskScore]


def _measured(
    folder: Path,
    evaluations: Sequence[Evaluation],
    tasks: Sequence[str],
    limit: int | None,
    device: str | None,
    observer: Observer,
) -> _Measured:
    """The figures of one folder, whose model is gone from memory afterwards."""
    report, loaded = Report.read(folder), load_model(str(folder), device=device, log=observer.say)
    name, loss = report.config.method, report.mean_loss() if report.recovery is None else None
    found = [MethodPerplexity(name, loss, perplexity_of(loaded, text, observer).perplexity) for text in evaluations]
    return _Measured(found, _scores(loaded, tasks, limit, observer))


def _scores(loaded: Loaded, tasks: Sequence[str], limit: int | None, observer: Observer) -> list[TaskScore]:
    return evaluate_tasks(loaded.model, loaded.tokenizer, tasks, limit, log=observer.say) if tasks else []


def evaluate_dense(
    loaded: Loaded,
    evaluations: Sequence[Evaluation] = (Evaluation(),),
    tasks: Sequence[str] = (),
    limit: int | None = None,
    *,
    observer: Observer | None = None,
) -> Figures:
    """Measure a dense model by itself: as for a report, without any pruned method.

    Raises:
        ValueError: the model is pruned; `evaluate_folder` compares it with its dense one.
    """
    if any(isinstance(module, PRUNED) for module in loaded.model.modules()):
        raise ValueError(f"{loaded.name} is pruned, and has no report.json that names its dense model: put it back")
    observer = Observer() if observer is None else observer
    for evaluation in evaluations:
        check_text(loaded, evaluation, observer.say)
    if tasks:
        check_request(tasks, limit)
    return Figures(
        tuple(_as_dense(perplexity_of(loaded, text, observer)) for text in evaluations),
        tuple(
            TaskRecord(score.task, score.questions, score.accuracy, None, score.standard_error)
            for score in _scores(loaded, tasks, limit, observer)
        ),
    )


def _as_dense(found: MeasuredPerplexity) -> PerplexityRecord:
    pinned = asdict(found)
    return PerplexityRecord(dense=pinned.pop("perplexity"), **pinned)


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
    model: str,
    out: Path,
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
    observer = Observer() if observer is None else observer
    for evaluation in evaluations:
        check_name(evaluation.text)
    beside = {method: out.with_name(f"{out.name}-{method}") for method in methods if method != config.method}
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
