"""How far pruned folders are from their dense model on texts of different kinds, calibration's own kind among them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from armorfact_hf.data.load_model import Loaded, load_model
from armorfact_hf.data.questions import fetch_questions
from armorfact_hf.data.texts import EVALUATION, evaluation_source, tokens_of
from armorfact_hf.data.tokens import spread, tokenize, windows
from armorfact_hf.files import written_beside
from armorfact_hf.model.words import Speaker, WordsApart
from armorfact_hf.runs.compare import dense_model
from benchmarks.evidence.folders import key_of, reports_of
from benchmarks.evidence.tables import table
from benchmarks.evidence.tasks import CHOICE_TASKS, Vector, score

WINDOWS, LENGTH, QUESTIONS = 12, 512, 80


def text_table(folders: Sequence[Path], kept: Path) -> str:
    """A line a folder, a column a kind of text: nats a token from the dense model, and its share of the first folder's.

    The texts are what is held out of every demo text, and the questions of tasks, each with its right answer.

    Args:
        folders: what `prune_to_folder` wrote. kept: the file of the figures found so far.

    Raises:
        ValueError: as `reports_of` does.
    """
    dense = dense_model(reports_of(folders)[0])
    texts = kinds(dense, LENGTH)
    found = {folder.name: _measured(folder, dense, texts, kept) for folder in folders}
    return divergence_table(found)


def divergence_table(found: Mapping[str, Mapping[str, Vector]]) -> str:
    """The table of divergences by folder and kind of text, of each window or question."""
    first = next(iter(found.values()))
    rows = []
    for name, by in found.items():
        shares = {kind: "" if by is first else f", {_share(by[kind], first[kind])}" for kind in first}
        rows.append([name, *(_shown(by[kind]) + shares[kind] for kind in first)])
    return table(["", *first], rows)


def kinds(loaded: Loaded, length: int) -> dict[str, list[torch.Tensor]]:
    """Tokens of each kind of text: windows of the same length, and questions as long as they are."""
    found = {}
    for name in EVALUATION:
        tokens = tokens_of(evaluation_source(f"demo:{name}", lambda _: None), loaded)
        found[name] = [torch.from_numpy(row) for row in spread(windows(tokens, length, bos=loaded.bos), WINDOWS)]
    head = [] if loaded.bos is None else [loaded.bos]
    for task, asked in fetch_questions().items():
        if task in CHOICE_TASKS:
            told = [f"{each['context']} {each['choices'][each['gold']]}" for each in asked[:QUESTIONS]]
            found[task] = [torch.tensor([*head, *tokenize(text, loaded.tokenizer)]) for text in told]
    return found


def _measured(
    folder: Path, dense: Loaded, texts: Mapping[str, Sequence[torch.Tensor]], kept: Path
) -> dict[str, Vector]:
    """The divergence on each window, by kind of text; what does not stand in the file is measured, and kept."""
    known = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}
    mine = known.setdefault(key_of(folder), {})
    apart: WordsApart | None = None
    for kind, tokens in texts.items():
        if kind not in mine:
            apart = apart or WordsApart(Speaker(load_model(str(folder)).model), Speaker(dense.model))
            mine[kind] = [_divergence(apart, window) for window in tokens]
            kept.parent.mkdir(parents=True, exist_ok=True)
            with written_beside(kept) as draft:
                draft.write_text(json.dumps(known), encoding="utf-8")
    return {kind: np.array(mine[kind]) for kind in texts}


def _divergence(apart: WordsApart, window: torch.Tensor) -> float:
    return apart.of(window, apart.student.states(window), apart.teacher.taught(window))


def _shown(values: Vector) -> str:
    mean, error = score(values)
    return f"{mean:.3f} ± {error:.3f}"


def _share(values: Vector, others: Vector) -> str:
    return f"{values.mean() / others.mean():.2f}"
