"""SparseGPT (Frantar and Alistarh, arXiv 2301.00774): prune column by column, later columns repair.

The published sweep needs U, the upper Cholesky factor of H^-1. With the reversed factorization
H = V V' (V upper triangular) that factor is V^-1, and the sweep can be written in V itself: when
column j is reached, the errors made so far, E = W - C, have moved it to

    w_j = W_j + sum_{k<j} E_k V_kj / V_jj,

and the saliency w_j^2 / U_jj^2 is (w_j V_jj)^2. A whole group g, before its own columns are pruned,
has moved to W_g + (E V)_g V_gg^-1. So no inverse but of M x M blocks is ever formed (the same
identity underlies LDLQ in QuIP, Chee et al., arXiv 2307.13304, Theorem 6).
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np

from armorfact import arrays, blocks, validate
from armorfact.gram import DiagonalGram, FullGram, Gram
from armorfact.initial.masked import keep_largest
from armorfact.initial.wanda import prune as by_wanda
from armorfact.pattern import Pattern

Array = Any

PANEL = 128
MAX_DOUBLINGS = 40


class DampingWarning(UserWarning):
    """The Gram matrix needed more damping than was asked for."""


def sparsegpt(
    weight: Array,
    XXt: Array | None,
    *,
    pattern: str | Pattern = "2:4",
    damping: float = 0.01,
) -> Array:
    r"""Greedy minimization of :math:`\operatorname{tr}((W - C)H(W - C)^\top)`, one column at a time.

    Each group's mask is chosen when the sweep reaches it, from the weights as they then are.

    Args:
        weight: W, (d_out, d_in), real floating point.
        XXt: H = X X', (d_in, d_in), or its diagonal (d_in,); None is the identity.
        pattern: "N:M".
        damping: multiple of the mean diagonal of H added to it; doubled until H is definite,
            which is reported as a `DampingWarning`.

    Returns:
        The pruned weight; same shape, dtype and device. A row whose repaired weights would leave
        the range of the dtype keeps the weights that Wanda keeps, as they are.

    Raises:
        TypeError, ValueError: as `armorfact.factorize`, but for an H with negative eigenvalues, which is damped.
    """
    pattern = Pattern.parse(pattern)
    if not 0 <= damping < float("inf"):
        raise ValueError(f"damping must be a finite number >= 0, got {damping}")
    weight = validate.weight(weight, pattern)
    gram, _ = validate.gram(XXt, weight)
    scaled, exponent = validate.scaled(weight)
    with arrays.plain_arithmetic(weight):
        pruned = prune(scaled, gram, pattern, damping)
        pruned, _ = within_range(pruned, scaled, gram, pattern, (exponent, weight.dtype))
    return arrays.rounded(arrays.times_two_to(pruned, exponent), weight.dtype)


def within_range(
    pruned: Array, weight: Array, gram: Gram, pattern: Pattern, home: tuple[int, Any]
) -> tuple[Array, int]:
    """``pruned`` with Wanda's choice in the rows that overflow in W's own units and dtype, and their number."""
    xp = arrays.namespace(weight)
    exponent, dtype = home
    beyond = xp.any(~xp.isfinite(arrays.rounded(arrays.times_two_to(pruned, exponent), dtype)), axis=1)
    count = int(xp.count_nonzero(beyond))
    if not count:
        return pruned, 0
    kept = by_wanda(weight, gram, pattern)
    return xp.where(beyond[:, None], kept, pruned), count


def prune(weight: Array, gram: Gram, pattern: Pattern, damping: float = 0.01) -> Array:
    """`sparsegpt` on checked arguments of one working dtype."""
    xp = arrays.namespace(weight)
    mean = float(xp.mean(arrays.float64(gram.diagonal)))
    added = damping * mean or 1e-12 * mean or 1.0
    if isinstance(gram, DiagonalGram):
        # Columns do not couple: there is nothing to repair, only the saliency w^2 (h + damping).
        return keep_largest(weight, weight**2 * (gram.diagonal + added), pattern)
    return _sweep(weight, damped_factor(gram, added), pattern)


def damped_factor(gram: FullGram, added: float) -> Array:
    """V with its rows and columns in reverse order, so lower triangular, in float64, (d_in, d_in).

    V is upper triangular, with V V' = H + added * I.
    """
    xp = arrays.namespace(gram.matrix)
    size = gram.matrix.shape[0]
    mean = float(xp.mean(arrays.float64(gram.diagonal)))
    for attempt in range(MAX_DOUBLINGS):
        # By columns, so that the factor can take its place: no second array of this size is made.
        flat = xp.reshape(arrays.flipped(arrays.transpose(gram.matrix), xp.float64), (-1,))
        flat[:: size + 1] += added
        factor = arrays.cholesky(arrays.transpose(xp.reshape(flat, (size, size))), overwrite=True)
        del flat
        if factor is not None:
            if attempt:
                warnings.warn(
                    f"the Gram matrix is not positive definite: SparseGPT's damping was doubled "
                    f"{attempt} times, to {added / (mean or 1.0):.3g} of the mean diagonal",
                    DampingWarning,
                    stacklevel=2,
                )
            return factor
        added *= 2
    raise np.linalg.LinAlgError(
        f"the Gram matrix has no Cholesky factor even with {added / (mean or 1.0):.3g} of its mean diagonal added; "
        "is it symmetric and positive semidefinite?"
    )


def _sweep(weight: Array, factor: Array, pattern: Pattern) -> Array:
    """The greedy sweep in panels of columns; ``carried`` is E V, the feedback before division.

    Args:
        factor: V as `damped_factor` gives it.
    """
    xp = arrays.namespace(weight)
    inverses = xp.linalg.inv(xp.flip(blocks.diagonal_blocks(factor, pattern.group)))
    inverses = xp.astype(inverses, weight.dtype, copy=False)
    factor = arrays.flipped(factor, weight.dtype)
    pruned = xp.zeros_like(weight)
    error = xp.empty_like(weight)
    d_in = weight.shape[1]
    panel = max(PANEL // pattern.group, 1) * pattern.group
    for lo in range(0, d_in, panel):
        hi = min(lo + panel, d_in)
        carried = error[:, :lo] @ factor[:lo, lo:hi]
        for group in range(lo, hi, pattern.group):
            columns = slice(group, group + pattern.group)
            inside = slice(group - lo, group - lo + pattern.group)
            pruned[:, columns] = _prune_group(
                weight[:, columns],
                carried[:, inside],
                factor[columns, columns],
                inverses[group // pattern.group, ...],
                pattern,
            )
            error[:, columns] = weight[:, columns] - pruned[:, columns]
            carried += error[:, columns] @ factor[columns, lo:hi]
    return pruned


def _prune_group(weight: Array, carried: Array, factor: Array, inverse: Array, pattern: Pattern) -> Array:
    """Prune one group of every row: its mask first, then its columns from left to right.

    Args:
        weight, carried: (d_out, M), the weights and E V over the columns before the group.
        factor, inverse: (M, M), the group's diagonal block of V and its inverse.
    """
    xp = arrays.namespace(weight)
    pivots = xp.linalg.diagonal(factor)
    # All M columns as the sweep has moved them so far; U_jj = 1 / V_jj.
    mask = pattern.top_mask(((weight + carried @ inverse) * pivots) ** 2)
    pruned = xp.zeros_like(weight)
    for j in range(pattern.group):
        repaired = (weight - pruned)[:, :j] @ factor[:j, j : j + 1]
        column = weight[:, j] + (carried[:, j] + repaired[:, 0]) / pivots[j]
        pruned[:, j] = xp.where(mask[:, j], column, xp.zeros_like(column))
    return pruned
