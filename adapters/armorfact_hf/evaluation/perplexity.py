"""Perplexity on windows of a text, with everything that it depends on pinned and kept beside the figure."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from armorfact_hf.data.tokens import spread
from armorfact_hf.model.causal_lm import CausalLM
from armorfact_hf.model.nonfinite import NonFiniteActivations
from armorfact_hf.model.token_divergence import BodyAndHead

# Positions whose logits stand in memory at a time: with 262k words in the vocabulary, 0.3 GB in float32.
POSITIONS_AT_ONCE = 256


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-likelihood of the scored tokens, each given those before it in its window.

    Args:
        value: the perplexity.
        tokens: how many were scored.
        window, stride: the length of a window, its bos included, and how far one starts after the other, in tokens.
        bos: the token at the head of every window, or None.
    """

    value: float
    tokens: int
    window: int
    stride: int
    bos: int | None


def evaluate_perplexity(
    model: CausalLM,
    tokens: Any,
    window: int = 2048,
    stride: int | None = None,
    bos: int | None = None,
    max_windows: int | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> Perplexity:
    """The perplexity of a causal language model on a text.

    A window scores all its tokens but the first (which only a bos can predict), as far as the window before it did not
    hold them: no token is scored twice.

    Args:
        model: of transformers, on any device.
        tokens: (n,) integer token numbers of the text, without special tokens.
        window: tokens a window, bos included; at most what the model was trained for.
        stride: tokens between the starts of two windows; the text of a whole window by default, so that none overlap.
        bos: a token number for the head of every window (Gemma needs it), or None.
        max_windows: take so many, spread evenly over the text; all whole windows by default.
        progress: called with the windows done and their number.

    Raises:
        ValueError: the tokens are not a vector, the window does not fit, or there are too few tokens for one.
        NonFiniteActivations: the model computes NaN.
    """
    text = torch.as_tensor(tokens)
    length = window - (bos is not None)
    stride = length if stride is None else stride
    starts = starts_of(text, length, stride, max_windows)
    model.eval()
    total, scored = 0.0, 0
    end = 0
    for done, start in enumerate(starts, 1):
        row = text[start : start + length]
        row = row if bos is None else torch.cat([torch.tensor([bos], dtype=row.dtype), row])
        fresh = min(start + length - end, length)
        losses = token_losses(model, row.to(torch.int64))[-fresh:]
        total, scored, end = total + float(losses.sum(dtype=torch.float64)), scored + len(losses), start + length
        if progress is not None:
            progress(done, len(starts))
    if math.isnan(total):
        raise NonFiniteActivations("the model computes NaN on this text, and has no perplexity there")
    return Perplexity(_exp(total / scored), scored, window, stride, bos)


def starts_of(text: Tensor, length: int, stride: int | None, max_windows: int | None) -> list[int]:
    """Where the windows of a text begin.

    Args:
        length: of a window, a bos not counted. stride, max_windows: as of `evaluate_perplexity`.

    Raises:
        ValueError: no such windows, or too little text.
    """
    stride = length if stride is None else stride
    if text.ndim != 1 or text.is_floating_point():
        raise ValueError(f"expected a vector of token numbers, got shape {tuple(text.shape)} of {text.dtype}")
    if length < 2 or not 1 <= stride <= length or (max_windows is not None and max_windows < 1):
        raise ValueError(
            f"expected a window of two tokens of text or more, a stride from 1 to {length} and a positive number of "
            f"windows, got {length=}, {stride=}, {max_windows=}"
        )
    if len(text) < length:
        raise ValueError(
            f"one window needs {length} tokens of text, got {len(text)}: give more text or a shorter window"
        )
    return spread(range(0, len(text) - length + 1, stride), max_windows)


def _exp(mean: float) -> float:
    return math.exp(mean) if mean < 700 else math.inf


@torch.no_grad()
def token_losses(model: CausalLM, row: Tensor) -> Tensor:
    """The negative log-likelihood of each token of a window after its first, (length - 1,) float32.

    The logits come from the model's own head, which may scale or cap them, a few positions at a time.
    """
    row, parts, losses = row.to(model.device), BodyAndHead(model), []
    given = parts.states(row)
    for lo in range(0, len(row) - 1, POSITIONS_AT_ONCE):
        part = slice(lo, min(lo + POSITIONS_AT_ONCE, len(row) - 1))
        logits = parts.logits(row[part], given[:, part]).values
        losses.append(functional.cross_entropy(logits.float(), row[1:][part], reduction="none"))
    return torch.cat(losses).cpu()
