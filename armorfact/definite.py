"""H as a solver may minimize over it: definite beyond what rounding makes of it."""

from __future__ import annotations

from typing import Any

from armorfact import arrays
from armorfact.gram import DiagonalGram, Gram

Array = Any


def rounding_of(given: Array, converted: Array) -> float:
    """How far rounding may have moved an eigenvalue of H, scaled to unit diagonal."""
    return 10 * max(arrays.epsilon(given), arrays.epsilon(converted)) * converted.shape[-1]


def unit_diagonal(matrix: Array) -> tuple[Array, Array]:
    """H scaled to unit diagonal, so that channels of small energy count as much as outliers; which have any."""
    xp = arrays.namespace(matrix)
    diagonal = xp.linalg.diagonal(matrix)
    alive = diagonal > 0
    scale = xp.where(alive, xp.where(alive, diagonal, xp.ones_like(diagonal)) ** -0.5, xp.zeros_like(diagonal))
    return matrix * scale[:, None] * scale[None, :], alive


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
    scaled, alive = unit_diagonal(gram.matrix)
    eye = xp.eye(scaled.shape[0], dtype=scaled.dtype, device=arrays.device(scaled))
    scaled += xp.where(alive, 0 * xp.ones_like(gram.diagonal), xp.ones_like(gram.diagonal)) * eye
    margin = 4 * arrays.epsilon(scaled) * scaled.shape[0] ** 0.5
    floor = 0.0
    while arrays.cholesky(scaled + (floor - margin) * eye) is None:
        if floor > tolerance:
            _refuse_indefinite(scaled, tolerance)
            break
        floor = 2 * floor or 2 * margin
    return gram.floored(floor) if floor else gram


def _refuse_indefinite(scaled: Array, tolerance: float) -> None:
    smallest = float(arrays.namespace(scaled).min(arrays.namespace(scaled).linalg.eigvalsh(arrays.float64(scaled))))
    if smallest < -tolerance:
        raise ValueError(
            f"XXt is not positive semidefinite: scaled to unit diagonal, its smallest eigenvalue "
            f"is {smallest:.3g}; it must be X @ X.T of real inputs"
        )
