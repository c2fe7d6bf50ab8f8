"""NoWag-P (Liu et al., arXiv 2504.14569): keep by the normalized weight's share of the output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from armorfact import arrays, validate
from armorfact.gram import Gram
from armorfact.initial.masked import keep_largest
from armorfact.pattern import Pattern

Array = Any


@dataclass(frozen=True)
class Normalization:
    """W_ij = row_i * normalized_ij * column_j, with unit-norm columns and then unit-norm rows."""

    row: Array
    column: Array
    normalized: Array


def normalize(weight: Array) -> Normalization:
    """NoWag's normalization: r1_j = ||W_:j||, r2_i = ||(W / r1)_i:||; zero norms count as one."""
    xp = arrays.namespace(weight)
    column = arrays.norms(weight, 0)
    scaled = weight / column
    row = arrays.norms(scaled, 1)
    return Normalization(row=row, column=column, normalized=scaled / xp.expand_dims(row, axis=1))


def nowag(weight: Array, XXt: Array | None, *, pattern: str | Pattern = "2:4") -> Array:
    r"""Keep, in each group, the N weights with the largest :math:`\bar W_{ij}^2\,\|X_j\|^2`.

    :math:`\bar W` is W with its columns and then its rows scaled to unit norm (`normalize`).

    Args:
        weight: W, (d_out, d_in), real floating point.
        XXt: H = X X', (d_in, d_in), or its diagonal (d_in,); None is the identity.
        pattern: "N:M".

    Returns:
        The pruned weight (in the original scale); same shape, dtype and device.

    Raises:
        TypeError, ValueError: as `armorfact.factorize`; of H the diagonal alone is looked at for its sign.
    """
    pattern = Pattern.parse(pattern)
    weight = validate.weight(weight, pattern)
    gram, _ = validate.gram(XXt, weight)
    return keep_largest(weight, score(validate.scaled(weight)[0], gram), pattern)


def prune(weight: Array, gram: Gram, pattern: Pattern) -> Array:
    """`nowag` on checked arguments of one working dtype."""
    return keep_largest(weight, score(weight, gram), pattern)


def score(weight: Array, gram: Gram) -> Array:
    """The squares of the normalized weight times ||X_j||^2, (d_out, d_in)."""
    return normalize(weight).normalized ** 2 * gram.diagonal
