"""What pruned folders answer beside their dense model: accuracy, and what is lost of it, question by question."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from armorfact_hf.data.load_model import Loaded, load_model
from armorfact_hf.data.questions import TASKS, Question, fetch_questions
from armorfact_hf.evaluation.tasks import choice_likelihoods
from armorfact_hf.runs.evaluate import dense_model
from benchmarks.evidence.folders import DENSE, key_of, reports_of
from benchmarks.evidence.tables import table
from benchmarks.kept import kept

CHOICE_TASKS = tuple(task for task in TASKS if task != "lambada")  # lambada has no choices to guess from
ERRORS_ABOVE = 2.0
PIECE = 250  # questions asked at a time, whose answers are kept together
Vector = NDArray[np.float64]
Score = tuple[float, float]  # a mean over questions, and its standard error


@dataclass(frozen=True)
class Answers:
    """What a model says to the questions of a task.

    Args:
        likelihoods: of each choice of each question, the log-likelihood.
        gold: the index of the right choice of each.
    """

    likelihoods: Sequence[Sequence[float]]
    gold: Sequence[int]

    @cached_property
    def right(self) -> Vector:
        """1 where the right choice is the likeliest, otherwise 0."""
        found = zip(self.likelihoods, self.gold, strict=True)
        return np.array([float(int(np.argmax(choices)) == gold) for choices, gold in found])

    @cached_property
    def probability(self) -> Vector:
        """That of the right choice among the choices: it moves where the likeliest one stays the same."""
        found = zip(self.likelihoods, self.gold, strict=True)
        return np.array([1 / np.exp(np.array(choices) - choices[gold]).sum() for choices, gold in found])


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


def score(values: Vector) -> Score:
    """The mean over questions and its standard error."""
    return float(values.mean()), float(values.std(ddof=1) / math.sqrt(len(values)))


def mean_of(scores: Sequence[Score]) -> Score:
    """The mean of scores of different tasks, and its standard error."""
    count = len(scores)
    return sum(a for a, _ in scores) / count, math.sqrt(sum(e * e for _, e in scores)) / count


def task_table(folders: Sequence[Path], tasks: Sequence[str], limit: int, out: Path) -> str:
    """The tables of what pruned folders and their dense model answer.

    Args:
        folders: what `prune_to_folder` wrote. tasks: out of `CHOICE_TASKS`. limit: questions a task.
        out: the folder where answers are kept, piece by piece.

    Raises:
        ValueError: as `reports_of` does, or an unknown task.
    """
    reports = reports_of(folders)
    if unknown := set(tasks) - set(CHOICE_TASKS):
        raise ValueError(f"expected tasks out of {', '.join(CHOICE_TASKS)}, got {', '.join(sorted(unknown))}")
    questions = {task: asked[:limit] for task, asked in fetch_questions().items() if task in tasks}
    model = reports[0].model
    found = {DENSE: _answers(out, model.fingerprint, lambda: dense_model(reports[0]), questions)}
    for folder in folders:
        found[folder.name] = _answers(out, key_of(folder), lambda folder=folder: load_model(str(folder)), questions)
    levels = {task: chance(asked) for task, asked in questions.items()}
    return f"{accuracy_table(found, levels)}\n\n{paired_table(found, levels)}"


def accuracy_table(found: Mapping[str, Mapping[str, Answers]], levels: Mapping[str, float]) -> str:
    """Accuracies and standard errors by model and task, and the mean over the tasks that the model can do.

    Args:
        found: by model, "dense" first, and task.
        levels: chance by task.
    """
    scores = {name: {task: score(answers.right) for task, answers in by.items()} for name, by in found.items()}
    counted = _counted(found, levels)
    rows = [["chance", *(f"{level:.3f}" for level in levels.values()), ""]]
    for name, by in scores.items():
        mean = _with_error(mean_of([by[task] for task in counted])) if counted else "none is above chance"
        rows.append([name, *(_with_error(by[task]) for task in levels), mean])
    counts = ", ".join(f"{task} {len(answers.gold)}" for task, answers in found[DENSE].items())
    left_out = [task for task in levels if task not in counted]
    note = f"Not in the mean, as the dense model is at chance: {', '.join(left_out)}." if left_out else ""
    return table(["", *levels, "mean"], rows) + f"\n\nQuestions: {counts}. {note}".rstrip()


def paired_table(found: Mapping[str, Mapping[str, Answers]], levels: Mapping[str, float]) -> str:
    """What each model loses beside the dense one, and what it has more than the first of them, on the same questions.

    Both are means over tasks above chance, of accuracy and of the probability of the right choice among the choices;
    their errors are of the differences, question by question, which are smaller than those of two accuracies.
    """
    counted = _counted(found, levels)
    dense, *names = found
    rows = []
    for name in names if counted else []:
        row = [name]
        for other, sign in ((dense, -1), (names[0], 1)):
            for measure in ("right", "probability"):
                mine, theirs = ([getattr(found[each][task], measure) for task in counted] for each in (name, other))
                differences = [score(sign * (a - b)) for a, b in zip(mine, theirs, strict=True)]
                row.append("" if name == other else _with_error(mean_of(differences)))
        rows.append(row)
    more = f"more than {names[0]}"
    return table(["", "accuracy lost", "probability lost", f"accuracy, {more}", f"probability, {more}"], rows)


def _counted(found: Mapping[str, Mapping[str, Answers]], levels: Mapping[str, float]) -> list[str]:
    return [task for task in levels if above_chance(*score(found[DENSE][task].right), levels[task])]


def _with_error(value: Score) -> str:
    return f"{value[0]:.3f} ± {value[1]:.3f}"


def _answers(
    out: Path, key: str, load: Callable[[], Loaded], questions: Mapping[str, Sequence[Question]]
) -> dict[str, Answers]:
    """A model's answers by task; pieces that are not in a file of ``out`` are asked for."""
    once = cache(load)

    def asked(piece: Sequence[Question]) -> list[list[float]]:
        return choice_likelihoods(once().model, once().tokenizer, piece)

    found = {}
    for task, all_of in questions.items():
        likelihoods = []
        for first in range(0, len(all_of), PIECE):
            piece = all_of[first : first + PIECE]
            likelihoods += kept(out, "answers", [key, task, first, len(piece)], partial(asked, piece))
        found[task] = Answers(likelihoods, [question["gold"] for question in all_of])
    return found
