"""What pruning cost: perplexity and tasks of finished folders, always beside those of their dense model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from armorfact_hf.checkpoint.folder import stored_tensors
from armorfact_hf.data.load_model import Loaded, Log, load_model
from armorfact_hf.data.texts import evaluation_source
from armorfact_hf.evaluation.measure import Evaluation, Progress, perplexity_of
from armorfact_hf.evaluation.tasks import evaluate_tasks
from armorfact_hf.layers.linear import FactorizedLinear
from armorfact_hf.observer import Observer
from armorfact_hf.pruning.config import PruneConfig
from armorfact_hf.report.page import write_report
from armorfact_hf.runs.prune_to_folder import Calibration, Json, prune_to_folder, read_report


def dense_model(report: Json, device: str | None = None, log: Log = print) -> Loaded:
    """The dense model that a report's folder was pruned from.

    Raises:
        ValueError: it cannot be loaded, or is another one by now.
    """
    facts = report["model"]
    loaded = load_model(facts["name"], dtype=facts["dtype"], device=device, log=log)
    if loaded.fingerprint != facts["fingerprint"]:
        raise ValueError(f"{facts['name']} is not the model that was pruned: its weights have changed since")
    return loaded


def evaluate_folder(
    folder: Path,
    evaluations: Sequence[Evaluation] = (Evaluation(),),
    tasks: Sequence[str] = (),
    limit: int | None = None,
    *,
    device: str | None = None,
    beside: Sequence[Path] = (),
    progress: Progress | None = None,
    log: Log = print,
) -> Json:
    """Measure a finished folder beside its dense model, and write the figures into its report.

    Args:
        folder: what `prune_to_folder` wrote.
        evaluations: texts for perplexity. tasks, limit: see `evaluate_tasks`.
        device: see `load_model`.
        beside: folders of the same model, whose figures are put into the report as well.

    Returns:
        The report.
    """
    report = read_report(folder)
    _check_beside(report, beside)
    reference = evaluate_dense(dense_model(report, device, log), evaluations, tasks, limit, progress=progress, log=log)
    entries = reference["evaluations"]
    for path in (*beside, folder):
        loaded = load_model(str(path), device=device, log=log)
        other = read_report(path)
        facts = {"name": other["config"]["method"], "mean_loss": mean_loss(other)}
        for entry, evaluation in zip(entries, evaluations, strict=True):
            found = perplexity_of(loaded, evaluation, progress, log)
            entry["methods"].append(facts | {"perplexity": found["perplexity"]})
    if tasks:
        after = evaluate_tasks(loaded.model, loaded.tokenizer, tasks, limit, log=log)
        for row, score in zip(reference["tasks"], after, strict=True):
            row |= {"pruned": score.accuracy, "standard_error": score.standard_error}
    report["evaluations"] = _merged(report["evaluations"], entries, ("text", "sha256", "window", "stride", "windows"))
    report["tasks"] = _merged(report["tasks"], reference["tasks"], ("task", "questions"))
    write_report(folder, report)
    return report


def _check_beside(report: Json, beside: Sequence[Path]) -> None:
    methods = [report["config"]["method"]]
    for path in beside:
        other = read_report(path)
        if other["model"]["fingerprint"] != report["model"]["fingerprint"]:
            raise ValueError(f"{path} was pruned from another model ({other['model']['name']}): leave it out")
        methods.append(other["config"]["method"])
    if len(set(methods)) < len(methods):
        raise ValueError(f"expected folders by different methods side by side, got {', '.join(methods)}")


def evaluate_dense(
    loaded: Loaded,
    evaluations: Sequence[Evaluation] = (Evaluation(),),
    tasks: Sequence[str] = (),
    limit: int | None = None,
    *,
    progress: Progress | None = None,
    log: Log = print,
) -> Json:
    """Measure a dense model by itself; "evaluations" and "tasks" as in a report, without any pruned method.

    Raises:
        ValueError: the model is pruned; `evaluate_folder` compares it with its dense one.
    """
    if any(isinstance(module, FactorizedLinear) for module in loaded.model.modules()):
        raise ValueError(f"{loaded.name} is pruned, and has no report.json that names its dense model: put it back")
    found = [perplexity_of(loaded, evaluation, progress, log) for evaluation in evaluations]
    scores = evaluate_tasks(loaded.model, loaded.tokenizer, tasks, limit, log=log) if tasks else []
    return {
        "evaluations": [{"dense": entry.pop("perplexity"), **entry, "methods": []} for entry in found],
        "tasks": [
            {
                "task": score.task,
                "questions": score.questions,
                "dense": score.accuracy,
                "pruned": None,
                "standard_error": score.standard_error,
            }
            for score in scores
        ],
    }


def _merged(old: list[Json], new: list[Json], keys: tuple[str, ...]) -> list[Json]:
    """The old entries that no new one replaces, then the new ones."""
    replaced = {tuple(entry[key] for key in keys) for entry in new}
    return [entry for entry in old if tuple(entry.get(key) for key in keys) not in replaced] + new


def mean_loss(report: Json) -> float:
    """The mean over a report's layers of the relative loss of the method that was stored."""
    method = report["config"]["method"]
    return sum(layer["losses"][method] for layer in report["layers"]) / len(report["layers"])


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
    names = {read_report(path)["config"]["method"] for path in (*beside, folder)}
    evaluations = [
        entry for entry in read_report(folder)["evaluations"] if names <= {row["name"] for row in entry["methods"]}
    ]
    # Texts of the same name are told apart by what is in them.
    texts = [name for name, _ in {(entry["text"], entry["sha256"]) for entry in evaluations}]
    for entry in evaluations:
        if texts.count(entry["text"]) > 1:
            entry["text"] += f" {entry['sha256'][:6]}"
    dense = {entry["text"]: entry["dense"] for entry in evaluations}
    pruned = [_row(path, evaluations, dense) for path in (*beside, folder)]
    size = read_report(folder)["model"]["bytes"]
    return [Row("dense", dense, dict.fromkeys(dense, 1.0), 0.0, size, 0.0), *pruned]


def _row(folder: Path, evaluations: Sequence[Json], dense: dict[str, float]) -> Row:
    report = read_report(folder)
    method = report["config"]["method"]
    perplexity = {
        entry["text"]: row["perplexity"] for entry in evaluations for row in entry["methods"] if row["name"] == method
    }
    ratio = {text: value / dense[text] for text, value in perplexity.items()}
    size = sum(tensor.nbytes for _, tensor in stored_tensors(folder))
    return Row(method, perplexity, ratio, mean_loss(report), size, report["totals"]["seconds"])


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
    progress: Progress | None = None,
    observer: Observer | None = None,
) -> list[Row]:
    """Prune a model by ``config`` into ``out`` and by other methods into folders beside it, and measure all alike.

    What is finished already is reused.

    Args:
        model, dtype, device: see `load_model`.
        methods: of one shot; each goes to the folder ``<out>-<method>``.
        progress: called during evaluations. observer: is told of all else.
    """
    observer = observer or Observer()
    log = observer.say
    for evaluation in evaluations:
        evaluation_source(evaluation.text, log)  # raises before the work if there is none
    beside = {method: out.with_name(f"{out.name}-{method}") for method in methods if method != config.method}
    for method, folder in {**beside, config.method: out}.items():
        log(f"Pruning {model} by {method}, into {folder}.")
        loaded = load_model(model, dtype, device, log)
        chosen = replace(config, method=method)
        prune_to_folder(loaded, folder, chosen, calibration, observer=observer)
        del loaded
    if evaluations:
        evaluate_folder(out, evaluations, device=device, beside=list(beside.values()), progress=progress, log=log)
    return rows(out, list(beside.values()))
