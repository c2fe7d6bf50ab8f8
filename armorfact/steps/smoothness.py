"""Smoothness constants: bounds on the curvature of the loss in each block (ARMOR, Theorem 3.1).

The loss is quadratic in every block, so a constant beta with curvature <= beta makes a gradient
step of length 1/beta lower the loss by at least ||gradient||^2 / (2 beta) (the descent lemma).
"""

from __future__ import annotations

from typing import Any

from armorfact import arrays
from armorfact.problem import Factors, Problem
from armorfact.steps.core import wrapped_gram

Array = Any


def largest_eigenvalue(gram: Array) -> Array:
    """lambda_max of (batches of) symmetric matrices, float64."""
    xp = arrays.namespace(gram)
    return xp.max(xp.linalg.eigvalsh(arrays.float64(gram)), axis=-1)


def left_smoothness(inner_gram: Array) -> Array:
    """beta_A,i = 2 lambda_max(Z_i H Z_i')."""
    return 2 * largest_eigenvalue(inner_gram)


def right_smoothness(outer_gram: Array, input_gram: Array) -> Array:
    """beta_B,j = 2 lambda_max(G_j' G_j) lambda_max(H_jj)."""
    return 2 * largest_eigenvalue(outer_gram) * largest_eigenvalue(input_gram)


def core_smoothness(problem: Problem, factors: Factors) -> float:
    """beta_C = 2 max_i lambda_max(A_i' A_i) lambda_max(B H B')."""
    xp = arrays.namespace(factors.left)
    outer = xp.max(largest_eigenvalue(arrays.transpose(factors.left) @ factors.left))
    inner = xp.max(largest_eigenvalue(wrapped_gram(problem, factors.right)))
    return 2 * float(outer) * float(inner)
