"""Perplexity and tasks of finished folders, always beside those of their dense model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from armorfact_hf.checkpoint.folder import describe_folder
from armorfact_hf.checkpoint.verify import check_headers
from armorfact_hf.data.load_model import Loaded, load_model
from armorfact_hf.data.origin import CARD
from armorfact_hf.data.texts import check_name
from armorfact_hf.evaluation.measure import Evaluation, MeasuredPerplexity, check_text, perplexity_of
from armorfact_hf.evaluation.tasks import TaskScore, check_request, evaluate_tasks
from armorfact_hf.files import one_at_a_time
from armorfact_hf.layers.stack import pruned_modules
from armorfact_hf.model.nonfinite import NonFiniteActivations
from armorfact_hf.observer import Log, Observer
from armorfact_hf.report.card import write_card
from armorfact_hf.report.page import write_report
from armorfact_hf.report.record import FILE, MethodPerplexity, PerplexityRecord, Report, TaskRecord


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
    loaded.refuse_other_than(facts.fingerprint)
    return loaded


def evaluate_folder(
    folder: Path | str,
    evaluations: Sequence[Evaluation] = (Evaluation(),),
    tasks: Sequence[str] = (),
    limit: int | None = None,
    *,
    device: str | None = None,
    beside: Sequence[Path | str] = (),
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

    Raises:
        ValueError: a folder that is not whole, or made anew meanwhile; a model, text or task that is none; a dense
            model that changed. NonFiniteActivations: the dense model computes NaN.
    """
    observer = Observer() if observer is None else observer
    folder, paths = Path(folder), [Path(path) for path in beside]
    report = Report.read(folder)
    _check_beside(report, paths)
    for path in (folder, *paths):  # before the dense model is measured, which takes long
        check_headers(path, describe_folder(path))
    for evaluation in evaluations:
        check_name(evaluation.text)
    if tasks:
        check_request(tasks, limit)
    dense = evaluate_dense(dense_model(report, device, observer.say), evaluations, tasks, limit, observer=observer)
    others = [_measured(path, evaluations, (), None, device, observer).perplexities for path in paths]
    own = _measured(folder, evaluations, tasks, limit, device, observer)
    evaluated = [
        replace(record, methods=tuple(methods))
        for record, *methods in zip(dense.evaluations, *others, own.perplexities, strict=True)
    ]
    scored = [
        replace(record, pruned=score.accuracy, standard_error=score.standard_error)
        for record, score in zip(dense.tasks, own.scores, strict=True)
    ]
    with one_at_a_time(folder / FILE):
        found = Report.read(folder)
        if found.manifest != report.manifest:
            raise ValueError(f"{folder} was made anew while its model was measured: measure it again")
        found = found.merged(evaluated, scored)  # others may have measured meanwhile
        write_report(found, folder)
        if not write_card(folder):
            observer.say(f"{folder / CARD} was edited by hand: it is left as it is, without the new figures.")
    return found


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
    found = [MethodPerplexity(name, loss, _perplexity(loaded, text, observer)) for text in evaluations]
    return _Measured(found, _scores(loaded, tasks, limit, observer))


def _perplexity(loaded: Loaded, text: Evaluation, observer: Observer) -> float:
    """Infinite where a pruned model computes NaN: the figures of the others are not lost with it."""
    try:
        return perplexity_of(loaded, text, observer).perplexity
    except NonFiniteActivations as error:
        observer.say(f"{loaded.name}: {error}, so its perplexity on {text.text} is written down as infinite.")
        return math.inf


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
    if pruned_modules(loaded.model):
        raise ValueError(
            f"{loaded.name} is pruned, and a folder with the report.json that names its dense model is measured beside "
            "that: put report.json back; from the hub, fetch all files by `hf download NAME --local-dir FOLDER`"
        )
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
