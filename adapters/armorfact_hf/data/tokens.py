"""From text to windows of tokens: for every text, of a demo or of a user."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


def tokenize(text: str, tokenizer: Any) -> np.ndarray:
    """Token numbers of `text`, a 1-D int64 array, without the special tokens that a tokenizer adds around a text.

    Args:
        tokenizer: of transformers, or any callable with its signature.
    """
    return np.asarray(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int64)


def windows(tokens: np.ndarray, length: int, count: int | None = None, bos: int | None = None) -> np.ndarray:
    """Consecutive windows of tokens that do not overlap: a (count, length) int64 array.

    Args:
        tokens: 1-D integers.
        length: tokens of a window, `bos` included.
        count: how many windows, from the start of `tokens`; all that fit by default.
        bos: a token number to put at the head of every window (Gemma needs it), or None.

    Raises:
        ValueError: `length` has no room for text, `count` is not positive, or there are too few tokens.
    """
    text_length = length if bos is None else length - 1
    if text_length < 1 or (count is not None and count < 1):
        raise ValueError(f"expected a window or more, with room for text in it, got {count=}, {length=}, {bos=}")
    wanted = max(len(tokens) // text_length, 1) if count is None else count
    needed = wanted * text_length
    if len(tokens) < needed:
        raise ValueError(
            f"{wanted} windows of {length} tokens need {needed} tokens of text, got {len(tokens)}: "
            "ask for fewer or shorter windows, or give more text"
        )
    body = np.asarray(tokens[:needed], dtype=np.int64).reshape(wanted, text_length)
    return body if bos is None else np.insert(body, 0, bos, axis=1)


def spread(items: Sequence[Any] | np.ndarray, count: int | None) -> list[Any]:
    """``count`` of the items at even distances, from the first on; all of them if there are no more, or with None."""
    if count is None or count >= len(items):
        return list(items)
    return [items[k * len(items) // count] for k in range(count)]
