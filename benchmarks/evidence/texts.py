"""How far pruned folders are from their dense model on texts of different kinds, calibration's own kind among them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from armorfact_hf.data.load_model import Loaded, load_model
from armorfact_hf.data.questions import fetch_questions
from armorfact_hf.data.texts import TO_MEASURE, evaluation_source, tokens_of
from armorfact_hf.data.tokens import spread, tokenize, windows
from armorfact_hf.model.token_divergence import BodyAndHead, TokenDivergence
from armorfact_hf.runs.evaluate import dense_model
from benchmarks.evidence.folders import key_of, reports_of
from benchmarks.evidence.tables import table
from benchmarks.evidence.tasks import CHOICE_TASKS, Vector, score
from benchmarks.kept import kept

WINDOWS, LENGTH, QUESTIONS = 12, 512, 80


def text_table(folders: Sequence[Path], out: Path) -> str:
    """A line a folder, a column a kind of text: nats a token from the dense model, and its share of the first folder's.

    The texts are what is held out of every demo text, and the questions of tasks, each with its right answer.

    Args:
        folders: what `prune_to_folder` wrote. out: the folder where figures are kept.

    Raises:
        ValueError: as `reports_of` does.
    """
    dense = dense_model(reports_of(folders)[0])
    texts = kinds(dense, LENGTH)
    found = {folder.name: _measured(folder, dense, texts, out) for folder in folders}
    return divergence_table(found)


def divergence_table(found: Mapping[str, Mapping[str, Vector]]) -> str:
    """The table of divergences by folder and kind of text, of each window or question."""
    first = next(iter(found.values()))
    rows = []
    for name, by in found.items():
        shares = {kind: "" if by is first else f", {_share(by[kind], first[kind])}" for kind in first}
        rows.append([name, *(_shown(by[kind]) + shares[kind] for kind in first)])
    return table(["", *first], rows)


def kinds(loaded: Loaded, length: int) -> dict[str, list[Tensor]]:
    """Tokens of each kind of text: windows of the same length, and questions as long as they are."""
    found = {}
    for name in TO_MEASURE:
        tokens = tokens_of(evaluation_source(f"demo:{name}", lambda _: None), loaded)
        found[name] = [torch.from_numpy(row) for row in spread(windows(tokens, length, bos=loaded.bos), WINDOWS)]
    head = [] if loaded.bos is None else [loaded.bos]
    for task, asked in fetch_questions().items():
        if task in CHOICE_TASKS:
            told = [f"{each['context']} {each['choices'][each['gold']]}" for each in asked[:QUESTIONS]]
            found[task] = [torch.tensor([*head, *tokenize(text, loaded.tokenizer)]) for text in told]
    return found


def _measured(folder: Path, dense: Loaded, texts: Mapping[str, Sequence[Tensor]], out: Path) -> dict[str, Vector]:
    """The divergence on each window, by kind of text; what is in no file of ``out`` is measured."""
    divergence = cache(lambda: TokenDivergence(BodyAndHead(load_model(str(folder)).model), BodyAndHead(dense.model)))

    def measured(tokens: Sequence[Tensor]) -> list[float]:
        return [_divergence(divergence(), window) for window in tokens]

    return {
        kind: np.array(kept(out, "texts", [key_of(folder), [w.tolist() for w in tokens]], partial(measured, tokens)))
        for kind, tokens in texts.items()
    }


def _divergence(divergence: TokenDivergence, window: Tensor) -> float:
    return divergence.of(window, divergence.student.states(window), divergence.teacher.recall(window))


def _shown(values: Vector) -> str:
    mean, error = score(values)
    return f"{mean:.3f} ± {error:.3f}"


def _share(values: Vector, others: Vector) -> str:
    return f"{values.mean() / others.mean():.2f}"
