"""H as a solver may minimize over it: definite beyond what rounding makes of it."""

from __future__ import annotations

from typing import Any

from armorfact import arrays
from armorfact.gram import DiagonalGram, Gram

Array = Any


FAINT = 1e-7  # what a channel adds to the energy of the outputs, as a share of the median one
FINE = 0.01  # where roundings are too fine to matter, all of them may go one way


def rounding_of(given: Array, converted: Array) -> float:
    """How far rounding may have moved an eigenvalue of H, scaled to unit diagonal.

    The norm of a matrix of d x d roundings is at most d of them, and about the root of d where they are independent; in
    16 bits the former would let anything pass.
    """
    size, one = converted.shape[-1], 10 * max(arrays.epsilon(given), arrays.epsilon(converted))
    return min(one * size, max(one * size**0.5, FINE))


def unit_scale(matrix: Array) -> Array:
    """What scales rows and columns of (batches of) H to unit diagonal, zero for channels without energy.

    So channels of small energy count as much as outliers.
    """
    xp = arrays.namespace(matrix)
    diagonal = xp.linalg.diagonal(matrix)
    alive = diagonal > 0
    return xp.where(alive, xp.where(alive, diagonal, xp.ones_like(diagonal)) ** -0.5, xp.zeros_like(diagonal))


def definite(gram: Gram, given: Array | None) -> Gram:
    """H as a solver may minimize over it: with no eigenvalue that rounding could have made negative.

    Where H, scaled to unit diagonal, is definite beyond what float32 (or float64) resolves, it is
    returned as it is; else with a floor, a few roundings of each diagonal entry, added to it. An
    H of few tokens has zero eigenvalues; rounded, some are negative, and minimizing finds them.

    Args:
        gram: H in the working dtype. given: XXt, whose dtype says how negative rounding may be.

    Raises:
        ValueError: not positive semidefinite.
    """
    if isinstance(gram, DiagonalGram):
        return gram
    xp = arrays.namespace(gram.matrix)
    tolerance = rounding_of(given, gram.matrix)
    size = gram.matrix.shape[0]
    scale = unit_scale(gram.matrix)
    scaled = gram.matrix * scale[:, None]
    scaled *= scale[None, :]
    flat = xp.reshape(scaled, (-1,))
    margin = 4 * arrays.epsilon(flat) * size**0.5
    floor = 0.0
    while True:
        flat[:: size + 1] = 1 + floor - margin  # a channel without energy counts as definite
        if arrays.cholesky(xp.reshape(flat, (size, size))) is not None:
            return gram.floored(floor) if floor else gram
        if floor > tolerance:
            flat[:: size + 1] = 1.0
            _refuse_indefinite(xp.reshape(flat, (size, size)), tolerance)
            return gram.floored(floor)
        floor = 2 * (floor or margin)


def without_faint_channels(gram: Gram, weight: Array) -> Gram:
    """H as a solver may minimize over it, with more energy for channels that add hardly any to the outputs of W.

    Minimizing would make of the columns of such channels whatever the others have use for, at any
    size, until none of it is accepted. Each is given `FAINT` of what the median channel adds. A
    channel of little energy and large weights is none of them, nor is one without energy.

    Args:
        weight: W, (d_out, d_in), as the solver is given it.
    """
    if isinstance(gram, DiagonalGram):  # where every column is found by itself
        return gram
    size = arrays.norms(weight, 0) ** 2
    size = arrays.namespace(size).clip(size, min=_median(size))
    return gram.lifted(FAINT * _median(gram.diagonal * size) / size)


def _median(values: Array) -> float:
    """Of those that are positive; zero if none is."""
    xp = arrays.namespace(values)
    ordered = xp.sort(values)
    count = int(xp.count_nonzero(ordered > 0))
    return float(ordered[-((count + 1) // 2)]) if count else 0.0


def _refuse_indefinite(scaled: Array, tolerance: float) -> None:
    xp = arrays.namespace(scaled)
    smallest = float(xp.min(xp.linalg.eigvalsh(arrays.float64(scaled))))
    if smallest < -tolerance:
        raise ValueError(
            f"XXt is not positive semidefinite: scaled to unit diagonal, its smallest eigenvalue "
            f"is {smallest:.3g}; it must be X @ X.T of real inputs"
        )
