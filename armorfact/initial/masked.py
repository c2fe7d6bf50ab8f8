"""What the score-based pruning methods share: keep the best-scored weights as they are."""

from __future__ import annotations

from typing import Any

from armorfact import arrays
from armorfact.pattern import Pattern

Array = Any


def keep_largest(weight: Array, score: Array, pattern: Pattern) -> Array:
    """The weight with all but the N best-scored entries of each group set to zero."""
    xp = arrays.namespace(weight)
    return xp.where(pattern.top_mask(score), weight, xp.zeros_like(weight))
