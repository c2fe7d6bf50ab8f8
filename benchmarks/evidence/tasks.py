"""Accuracy of pruned folders beside their dense model, with standard errors, and a mean over what the model can do."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from armorfact_hf.data.load_model import load_model
from armorfact_hf.data.questions import TASKS, Question, fetch_questions
from armorfact_hf.evaluation.tasks import TaskScore, evaluate_tasks
from armorfact_hf.files import written_beside
from armorfact_hf.report.record import Report
from armorfact_hf.runs.compare import dense_model
from benchmarks.evidence.tables import table

CHOICE_TASKS = tuple(task for task in TASKS if task != "lambada")  # lambada has no choices to guess from
ERRORS_ABOVE = 2.0


def chance(questions: Sequence[Question]) -> float:
    """What a model gets right without reading: the better of guessing, and of always giving the commonest answer.

    The latter matters where the choices are the same words in all questions: yes is right in 62% of BoolQ.
    """
    guessing = sum(1 / len(question["choices"]) for question in questions) / len(questions)
    right = [question["choices"][question["gold"]] for question in questions]
    return max(guessing, max(right.count(answer) for answer in set(right)) / len(right))


def above_chance(accuracy: float, error: float, level: float) -> bool:
    """Whether an accuracy is further above chance than twice its standard error."""
    return accuracy - level > ERRORS_ABOVE * error


def mean_of(scores: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """The mean of accuracies of different tasks, and its standard error."""
    count = len(scores)
    return sum(a for a, _ in scores) / count, math.sqrt(sum(e * e for _, e in scores)) / count


def task_table(folders: Sequence[Path], limit: int, kept: Path) -> str:
    """A line for each folder and dense model, a column for each task, and the mean over those above chance.

    Args:
        folders: what `prune_to_folder` wrote. limit: questions a task. kept: the file of the scores found so far.

    Raises:
        ValueError: no folders, or folders of different models.
    """
    reports = [Report.read(folder) for folder in folders]
    if len({report.model.fingerprint for report in reports}) != 1:
        raise ValueError("expected one or more folders that `armorfact prune` wrote, all of one model")
    model = reports[0].model
    scores = {"dense": _kept(kept, f"{model.fingerprint} {limit}", lambda: dense_model(reports[0]), limit)}
    for folder in folders:
        key = f"{folder.resolve()} {limit}"
        scores[folder.name] = _kept(kept, key, lambda folder=folder: load_model(str(folder)), limit)
    levels = {task: chance(found[:limit]) for task, found in fetch_questions().items() if task in CHOICE_TASKS}
    return scores_table(scores, levels)


def scores_table(scores: dict[str, dict[str, tuple[float, float]]], levels: dict[str, float]) -> str:
    """The table of accuracies and standard errors by model and task.

    Args:
        scores: by model, "dense" first, and task: accuracy and its standard error.
        levels: chance by task.
    """
    counted = [task for task in levels if above_chance(*scores["dense"][task], levels[task])]
    rows = [["chance", *(f"{level:.3f}" for level in levels.values()), ""]]
    for name, found in scores.items():
        mean = _with_error(mean_of([found[task] for task in counted])) if counted else "none is above chance"
        rows.append([name, *(_with_error(found[task]) for task in levels), mean])
    left_out = [task for task in levels if task not in counted]
    note = f"\n\nNot in the mean, as the dense model is at chance: {', '.join(left_out)}." if left_out else ""
    return table(["", *levels, "mean"], rows) + note


def _with_error(score: Sequence[float]) -> str:
    return f"{score[0]:.3f} ± {score[1]:.3f}"


def _kept(path: Path, key: str, load: Any, limit: int) -> dict[str, tuple[float, float]]:
    """Accuracy and standard error by task, measured unless they stand in the file."""
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if key not in known:
        loaded = load()
        found: list[TaskScore] = evaluate_tasks(loaded.model, loaded.tokenizer, CHOICE_TASKS, limit)
        known[key] = {score.task: (score.accuracy, score.standard_error) for score in found}
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_beside(path) as draft:
            draft.write_text(json.dumps(known, indent=1), encoding="utf-8")
    return known[key]
