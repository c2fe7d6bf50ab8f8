"""Wanda (Sun et al., arXiv 2306.11695): keep by |weight| times the norm of its input channel."""

from __future__ import annotations

from typing import Any

from armorfact import validate
from armorfact.gram import Gram
from armorfact.initial.masked import keep_largest
from armorfact.pattern import Pattern

Array = Any


def wanda(weight: Array, XXt: Array | None, *, pattern: str | Pattern = "2:4") -> Array:
    r"""Keep, in each group, the N weights with the largest :math:`|W_{ij}|\,\|X_j\|`.

    It minimizes :math:`\operatorname{tr}((W - C)\operatorname{diag}(H)(W - C)^\top)` over all C of the pattern.

    Args:
        weight: W, (d_out, d_in), real floating point.
        XXt: H = X X', (d_in, d_in), or its diagonal (d_in,); None is the identity.
        pattern: "N:M".

    Returns:
        The pruned weight; same shape, dtype and device.

    Raises:
        TypeError, ValueError: as `armorfact.factorize`; of H the diagonal alone is looked at for its sign.
    """
    pattern = Pattern.parse(pattern)
    weight = validate.weight(weight, pattern)
    gram, _ = validate.gram(XXt, weight)
    return keep_largest(weight, score(validate.scaled(weight)[0], gram), pattern)


def prune(weight: Array, gram: Gram, pattern: Pattern) -> Array:
    """`wanda` on checked arguments of one working dtype."""
    return keep_largest(weight, score(weight, gram), pattern)


def score(weight: Array, gram: Gram) -> Array:
    """|W_ij| ||X_j||, (d_out, d_in)."""
    return abs(weight) * gram.diagonal**0.5
