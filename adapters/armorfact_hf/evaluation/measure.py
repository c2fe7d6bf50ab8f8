"""The perplexity of a model on a named text, measured once and then remembered."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

import armorfact
from armorfact_hf.checkpoint.fingerprint import config_fingerprint, tokens_fingerprint
from armorfact_hf.data.load_model import Loaded
from armorfact_hf.data.texts import Text, evaluation_source, tokens_of
from armorfact_hf.data.wheels import cache_folder
from armorfact_hf.evaluation.perplexity import evaluate_perplexity, starts_of
from armorfact_hf.files import remember
from armorfact_hf.observer import Log, Observer, Step
from armorfact_hf.typed_json import from_json, to_json


@dataclass(frozen=True)
class Evaluation:
    """Which text perplexity is measured on, and how.

    Args:
        text: a file of plain text, "demo:gensim-enwiki", "demo:qasper" or "demo:python".
        windows: how many at most (None is all of the text); length: tokens of each.
        stride: see `evaluate_perplexity`.
    """

    text: str = "demo:gensim-enwiki"
    windows: int | None = 6
    length: int = 2048
    stride: int | None = None


@dataclass(frozen=True)
class MeasuredPerplexity:
    """A perplexity, and all that it depends on but the model.

    Args:
        text, split: name of the text, and which part of it. sha256: of its tokens.
        window, stride, bos: see `armorfact_hf.Perplexity`.
        windows: how many were asked for at most. chosen: how they lie in the text.
        tokens: how many were scored.
    """

    text: str
    split: str
    sha256: str
    window: int
    stride: int
    bos: int | None
    windows: int | None
    chosen: str
    tokens: int
    perplexity: float


def check_text(loaded: Loaded, evaluation: Evaluation, log: Log) -> None:
    """Make sure that a text can be measured on; it is fetched.

    Raises:
        ValueError: no such text, too little of it, or a window or stride that cannot be.
    """
    tokens = tokens_of(evaluation_source(evaluation.text, log), loaded)
    length = loaded.window(evaluation.length) - (loaded.bos is not None)
    starts_of(torch.from_numpy(tokens), length, evaluation.stride, evaluation.windows)


def perplexity_of(loaded: Loaded, evaluation: Evaluation, observer: Observer | None = None) -> MeasuredPerplexity:
    """The perplexity of a model on a text; measured once, then read from the cache folder.

    Raises:
        ValueError: no such text, too little of it, or a damaged file in the cache.
    """
    observer = Observer() if observer is None else observer
    text = evaluation_source(evaluation.text, observer.say)
    tokens = torch.from_numpy(tokens_of(text, loaded))
    key = {
        "text": text.name,
        "split": text.split,
        "sha256": tokens_fingerprint(tokens),
        "window": loaded.window(evaluation.length),
        "stride": evaluation.stride,
        "bos": loaded.bos,
        "windows": evaluation.windows,
        "model": loaded.fingerprint,
        "config": config_fingerprint(loaded.model),
        "versions": [armorfact.__version__, transformers.__version__, torch.__version__],
    }
    return _remembered(key, lambda: _measured(loaded, text, tokens, evaluation, observer))


def _measured(
    loaded: Loaded, text: Text, tokens: torch.Tensor, evaluation: Evaluation, observer: Observer
) -> MeasuredPerplexity:
    found = evaluate_perplexity(
        loaded.model,
        tokens,
        window=loaded.window(evaluation.length),
        stride=evaluation.stride,
        bos=loaded.bos,
        max_windows=evaluation.windows,
        progress=lambda done, total: observer.step(Step(done, total, "measuring perplexity")),
    )
    return MeasuredPerplexity(
        text=text.name,
        split=text.split,
        sha256=tokens_fingerprint(tokens),
        window=found.window,
        stride=found.stride,
        bos=found.bos,
        windows=evaluation.windows,
        chosen="evenly over the text",
        tokens=found.tokens,
        perplexity=found.value,
    )


def _remembered(key: Mapping[str, object], measure: Callable[[], MeasuredPerplexity]) -> MeasuredPerplexity:
    """``measure()``, kept in the cache folder under ``key``."""
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    path = cache_folder() / "perplexity" / f"{name[:32]}.json"
    if path.exists():
        return _read(path)
    found = measure()
    remember(path, json.dumps({"key": key, "found": to_json(found)}))
    return found


def _read(path: Path) -> MeasuredPerplexity:
    try:
        return from_json(_Kept, json.loads(path.read_text(encoding="utf-8"))).found
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): delete it, and it is measured again") from error


@dataclass(frozen=True)
class _Kept:
    """A file of the cache."""

    key: Mapping[str, object]
    found: MeasuredPerplexity
