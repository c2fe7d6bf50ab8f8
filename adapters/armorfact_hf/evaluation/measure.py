"""The perplexity of a model on a named text, measured once and then remembered."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from armorfact_hf.data.load_model import Loaded, Log
from armorfact_hf.data.texts import evaluation_source, tokens_of
from armorfact_hf.data.wheels import cache_folder
from armorfact_hf.evaluation.perplexity import evaluate_perplexity
from armorfact_hf.files import written_beside
from armorfact_hf.pruning.journal import tokens_fingerprint

Json = dict[str, Any]

Progress = Callable[[int, int], object]


@dataclass(frozen=True)
class Evaluation:
    """Which text perplexity is measured on, and how.

    Args:
        text: a file of plain text, "demo:gensim-enwiki" or "demo:qasper".
        windows: how many at most (None is all of the text); length: tokens of each.
        stride: see `evaluate_perplexity`.
    """

    text: str = "demo:gensim-enwiki"
    windows: int | None = 6
    length: int = 2048
    stride: int | None = None


def perplexity_of(loaded: Loaded, evaluation: Evaluation, progress: Progress | None = None, log: Log = print) -> Json:
    """The perplexity of a model on a text, with what it depends on; measured once, then read from the cache folder.

    Returns:
        text, split, sha256 (of the tokens), window, stride, bos, windows, tokens (scored), perplexity.
    """
    text = evaluation_source(evaluation.text, log)
    tokens = torch.from_numpy(tokens_of(text, loaded))
    asked = {
        "text": text.name,
        "split": text.split,
        "sha256": tokens_fingerprint(tokens),
        "window": loaded.window(evaluation.length),
        "stride": evaluation.stride,
        "bos": loaded.bos,
        "windows": evaluation.windows,
        "chosen": "evenly over the text",
    }
    key = {**asked, "model": loaded.fingerprint}
    return _remembered(key, lambda: asked | _measured(loaded, tokens, asked, progress))


def _measured(loaded: Loaded, tokens: torch.Tensor, asked: Json, progress: Progress | None) -> Json:
    found = evaluate_perplexity(
        loaded.model,
        tokens,
        window=asked["window"],
        stride=asked["stride"],
        bos=asked["bos"],
        max_windows=asked["windows"],
        progress=progress,
    )
    return {"stride": found.stride, "tokens": found.tokens, "perplexity": found.value}


def _remembered(key: Json, measure: Callable[[], Json]) -> Json:
    """``measure()``, kept in the cache folder under ``key``."""
    name = tokens_fingerprint(torch.tensor(list(json.dumps(key, sort_keys=True).encode())))
    path = cache_folder() / "perplexity" / f"{name[:32]}.json"
    if not path.exists():
        found = measure()
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_beside(path) as draft:
            draft.write_text(json.dumps({"key": key, "found": found}), encoding="utf-8")
    return json.loads(path.read_text(encoding="utf-8"))["found"]
