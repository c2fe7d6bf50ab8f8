"""Damping that keeps a step's system definite without ever raising the loss."""

from __future__ import annotations

from typing import Any

from armorfact import arrays

Array = Any

# Relative to each diagonal entry: above float32's rounding, far below what slows a step down.
DAMPING = 1e-6


def damped(gram: Array) -> Array:
    """``gram + DAMPING * diag(gram)``, in float64, with ones where the diagonal is zero.

    A step that solves with the damped matrix is a proximal step in the metric diag(gram): it is
    monotone for every damping >= 0. Damping by the own diagonal, not by its mean, makes the step
    the same in every gauge and for every scaling of the input channels; a channel that never
    fires has a zero diagonal, and stays where it is.

    Args:
        gram: (..., b, b) symmetric positive semidefinite.
    """
    xp = arrays.namespace(gram)
    gram = arrays.float64(gram)
    diagonal = xp.linalg.diagonal(gram)
    added = xp.where(diagonal > 0, DAMPING * diagonal, xp.ones_like(diagonal))
    eye = xp.eye(gram.shape[-1], dtype=gram.dtype, device=arrays.device(gram))
    return gram + added[..., None] * eye
