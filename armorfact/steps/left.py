r"""The left step: minimize the loss over the block-diagonal left wrapper A.

With Z = C B, each block row i is a least-squares problem of its own,

.. math:: \min_{A_i}\; \operatorname{tr}\bigl((W_i - A_i Z_i)\,H\,(W_i - A_i Z_i)^\top\bigr),

whose normal equations are :math:`A_i D_i = W_i H Z_i^\top`, with :math:`D_i = Z_i H Z_i^\top`. The step adds
:math:`E_i (D_i + \varepsilon\operatorname{diag} D_i)^{-1}` to A_i, where :math:`E_i = (RH)_i Z_i^\top` is minus
half the gradient.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from armorfact import arrays, blocks
from armorfact.problem import Factors, Problem
from armorfact.steps.damping import damped

Array = Any


def left_step(problem: Problem, factors: Factors) -> tuple[Factors, Array]:
    """One exact step in A: all blocks at once, one batched solve.

    Returns:
        The factors with A replaced, and R H (d_out, d_in) at them for the step that follows.
    """
    products = LeftProducts(problem, factors)
    transposed = arrays.solve(damped(products.gram), arrays.transpose(products.slope))
    return products.move(factors.left + arrays.transpose(transposed))


class LeftProducts:
    """The products every left step shares: Z H, D_i and E_i.

    The single large product is Z H (2 d_out d_in^2 flops); W H is known from the problem.
    """

    def __init__(self, problem: Problem, factors: Factors) -> None:
        self.problem, self.factors = problem, factors
        size = problem.block_out
        inner = blocks.right_product(factors.core, factors.right)
        self.inner_gram = problem.gram.multiply(inner)
        rows, gram_rows = blocks.split_rows(inner, size), blocks.split_rows(self.inner_gram, size)
        self.gram = rows @ arrays.transpose(gram_rows)
        excess = factors.left @ rows
        excess -= blocks.split_rows(problem.weight, size)
        self.slope = -(excess @ arrays.transpose(gram_rows))

    def move(self, left: Array) -> tuple[Factors, Array]:
        """The factors with ``left`` in place of A, and R H there."""
        residual_gram = blocks.left_product(-left, self.inner_gram)
        residual_gram += self.problem.weight_gram
        return self.factors.replace(left=left), residual_gram


def left_step_naive(problem: Problem, factors: Factors) -> Factors:
    """Twin of `left_step` in NumPy: each block by least squares on a square root of H."""
    weight, core, right, root = (
        np.asarray(x, dtype=np.float64)
        for x in (problem.weight, factors.core, blocks.dense(factors.right), gram_root(problem))
    )
    left = np.array(factors.left, dtype=np.float64)
    size = problem.block_out
    for i in range(left.shape[0]):
        rows = slice(i * size, (i + 1) * size)
        inputs = core[rows] @ right @ root
        left[i] = np.linalg.lstsq(inputs.T, (weight[rows] @ root).T, rcond=None)[0].T
    return factors.replace(left=left)


def gram_root(problem: Problem) -> np.ndarray:
    """X with X X' = H, (d_in, d_in) float64, by eigendecomposition; for the naive twins."""
    matrix = np.asarray(
        problem.gram.multiply(blocks.dense(blocks.identity_blocks(1, problem.weight.shape[1], problem.weight)))
    ).astype(np.float64)
    values, vectors = np.linalg.eigh(matrix)
    return vectors * np.sqrt(np.maximum(values, 0.0))
