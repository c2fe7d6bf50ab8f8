r"""The right step: minimize the loss over the block-diagonal right wrapper B.

With G = A C, the blocks of B couple through H, so they are visited in turn. For block j,

.. math:: \min_\Delta\; \operatorname{tr}\bigl((R - G_j \Delta P_j)\,H\,(R - G_j \Delta P_j)^\top\bigr)

(:math:`P_j` picks the rows of block j) has the solution
:math:`\Delta = (G_j^\top G_j)^{-1}\,G_j^\top (RH)_{:,j}\,H_{jj}^{-1}`; R H is brought up to date after each.
With a diagonal H the blocks do not couple and are solved at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from armorfact import arrays, blocks
from armorfact.gram import DiagonalGram, FullGram
from armorfact.problem import Factors, Problem
from armorfact.steps.damping import damped
from armorfact.steps.left import gram_root

Array = Any
Update = Callable[[Array, Array, Array], Array]


def right_step(problem: Problem, factors: Factors, residual_gram: Array) -> tuple[Factors, Array]:
    """One exact step in every block of B.

    Args:
        problem: the problem.
        factors: the factors to start from.
        residual_gram: R H at ``factors``, (d_out, d_in); it is overwritten.

    Returns:
        The factors with B replaced, and R H at them.
    """
    return sweep_right(problem, factors, residual_gram, _minimize)


def _minimize(outer_gram: Array, slope: Array, input_gram: Array) -> Array:
    """(G'G)^-1 slope (H_jj)^-1, damped; batched."""
    half = arrays.solve(damped(outer_gram), slope)
    return arrays.transpose(arrays.solve(damped(input_gram), arrays.transpose(half)))


def sweep_right(problem: Problem, factors: Factors, residual_gram: Array, update: Update) -> tuple[Factors, Array]:
    """Visit the blocks of B with ``update(G_j' G_j, G_j' (R H)_j, H_jj) -> dB_j``."""
    outer = blocks.split_columns(blocks.left_product(factors.left, factors.core), problem.block_in)
    outer_gram = arrays.transpose(outer) @ outer
    if isinstance(problem.gram, DiagonalGram):
        return _all_at_once(problem, factors, residual_gram, update, outer, outer_gram)
    return _in_turn(problem.gram, factors, residual_gram, update, outer, outer_gram)


def _all_at_once(
    problem: Problem,
    factors: Factors,
    residual_gram: Array,
    update: Update,
    outer: Array,
    outer_gram: Array,
) -> tuple[Factors, Array]:
    size = problem.block_in
    slope = arrays.transpose(outer) @ blocks.split_columns(residual_gram, size)
    change = update(outer_gram, slope, problem.gram.diagonal_blocks(size))
    residual_gram -= problem.gram.multiply(blocks.join_columns(outer @ change))
    return factors.replace(right=factors.right + change), residual_gram


def _in_turn(
    gram: FullGram,
    factors: Factors,
    residual_gram: Array,
    update: Update,
    outer: Array,
    outer_gram: Array,
) -> tuple[Factors, Array]:
    """Gauss-Seidel with a lazy update: a block's columns of R H are brought up to date when it is
    their turn, and once more after the last block, so every product is (d_out, k) @ (k, block).
    """
    xp = arrays.namespace(residual_gram)
    h, size = gram.matrix, factors.right.shape[-1]
    input_gram = gram.diagonal_blocks(size)
    moved = xp.empty_like(residual_gram)  # G_j dB_j, side by side: what R lost
    right = []
    for j in range(outer.shape[0]):
        lo, hi = j * size, (j + 1) * size
        if j:
            residual_gram[:, lo:hi] -= moved[:, :lo] @ h[:lo, lo:hi]
        slope = arrays.transpose(outer[j, ...]) @ residual_gram[:, lo:hi]
        change = update(outer_gram[j, ...], slope, input_gram[j, ...])
        right.append(factors.right[j, ...] + change)
        moved[:, lo:hi] = outer[j, ...] @ change
    for j in range(outer.shape[0]):
        lo, hi = j * size, (j + 1) * size
        residual_gram[:, lo:hi] -= moved[:, lo:] @ h[lo:, lo:hi]
    return factors.replace(right=xp.stack(right)), residual_gram


def right_step_naive(problem: Problem, factors: Factors) -> Factors:
    """Twin of `right_step` in NumPy: block after block, by least squares over vec(B_j)."""
    weight, left, core, root = (
        np.asarray(x, dtype=np.float64)
        for x in (problem.weight, blocks.dense(factors.left), factors.core, gram_root(problem))
    )
    right = np.array(factors.right, dtype=np.float64)
    outer, size = left @ core, problem.block_in
    for j in range(right.shape[0]):
        columns = slice(j * size, (j + 1) * size)
        others = right.copy()
        others[j] = 0
        target = (weight - outer @ blocks.dense(others)) @ root
        system = np.kron(outer[:, columns], root[columns].T)
        solution = np.linalg.lstsq(system, target.reshape(-1), rcond=None)[0]
        right[j] = solution.reshape(size, size)
    return factors.replace(right=right)
