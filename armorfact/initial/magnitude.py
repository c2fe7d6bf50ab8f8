"""Magnitude pruning: keep the largest weights of each group."""

from __future__ import annotations

from typing import Any

from armorfact import validate
from armorfact.gram import Gram
from armorfact.initial.masked import keep_largest
from armorfact.pattern import Pattern

Array = Any


def magnitude(weight: Array, XXt: Array | None = None, *, pattern: str | Pattern = "2:4") -> Array:
    r"""Keep, in each group, the N weights with the largest :math:`|W_{ij}|`.

    It minimizes :math:`\|W - C\|_F^2` over all C of the pattern.

    Args:
        weight: W, (d_out, d_in), real floating point.
        XXt: not used; all methods take the same arguments.
        pattern: "N:M".

    Returns:
        The pruned weight; same shape, dtype and device.

    Raises:
        TypeError, ValueError: as `armorfact.factorize` for its weight and pattern.
    """
    pattern = Pattern.parse(pattern)
    weight = validate.weight(weight, pattern)
    return keep_largest(weight, abs(validate.working(weight)), pattern)


def prune(weight: Array, gram: Gram, pattern: Pattern) -> Array:
    """`magnitude` on checked arguments."""
    return keep_largest(weight, abs(weight), pattern)
