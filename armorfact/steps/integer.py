r"""The core step for a core of whole numbers: every kept entry in turn goes to the best whole number.

The scales of C are in A and B, so its entries are integers. With :math:`T = A^\top A`, :math:`S = BHB^\top` and the
gradient :math:`q` of the entry (r, k), the loss as a function of that entry alone is
:math:`T_{rr}S_{kk}\delta^2 + 2q\delta`, whose best integer is the nearest to :math:`-q / (T_{rr}S_{kk})`. The supports
stay, and the loss cannot rise.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from armorfact import arrays, blocks
from armorfact.arrays.sweeps import sweep_integers
from armorfact.gram import DiagonalGram
from armorfact.problem import Factors, Problem
from armorfact.steps.core import core_gradient, gradient_panels, wrapped_gram
from armorfact.steps.left import gram_root
from armorfact.steps.rounding import LARGEST

Array = Any


def integer_core_step(problem: Problem, factors: Factors, kept: Array) -> Factors:
    """One pass over the kept entries of C, panel of columns after panel.

    Args:
        factors: with a core of whole numbers up to `LARGEST`, in a floating dtype.
        kept: (d_out, d_in) bool, the entries that may move.
    """
    xp = arrays.namespace(factors.core)
    left_gram = arrays.transpose(factors.left) @ factors.left
    core, size = xp.asarray(factors.core, copy=True), problem.block_out
    residual_gram = problem.residual_gram(factors)
    carried = residual_gram  # the columns that were used make room for T times the change of the core
    for lo, hi, gradient, above, gram in _panels(problem, factors, residual_gram):
        if above is not None:
            gradient = gradient + carried[:, :lo] @ above
        panel = xp.asarray(blocks.split_rows(core[:, lo:hi], size), copy=True)
        slopes = xp.asarray(blocks.split_rows(gradient, size), copy=True)
        sweep_integers(slopes, panel, blocks.split_rows(kept[:, lo:hi], size), left_gram, gram, LARGEST)
        new = blocks.join_rows(panel)
        carried[:, lo:hi] = blocks.left_product(left_gram, new - core[:, lo:hi])
        core[:, lo:hi] = new
    return factors.replace(core=core)


def _panels(
    problem: Problem, factors: Factors, residual_gram: Array
) -> Iterator[tuple[int, int, Array, Array | None, Array]]:
    """(lo, hi, Q[:, lo:hi], S[:lo, lo:hi] or None for zeros, S[lo:hi, lo:hi]) from left to right."""
    xp = arrays.namespace(residual_gram)
    if not isinstance(problem.gram, DiagonalGram):
        for lo, hi, gradient, gram in gradient_panels(problem, problem.gram, factors, residual_gram):
            yield lo, hi, gradient, gram[:lo, :] if lo else None, xp.asarray(gram[lo:hi, :], copy=True)
        return
    gradient, gram = core_gradient(factors, residual_gram), wrapped_gram(problem, factors.right)
    for j in range(gram.shape[0]):
        lo, hi = j * problem.block_in, (j + 1) * problem.block_in
        yield lo, hi, gradient[:, lo:hi], None, xp.asarray(gram[j, ...], copy=True)


def integer_core_step_naive(problem: Problem, factors: Factors, kept: np.ndarray) -> Factors:
    """Twin of `integer_core_step` in NumPy: every entry by least squares, the residual from scratch, and rounded."""
    root = gram_root(problem)
    left, right = (np.asarray(blocks.dense(x), dtype=np.float64) for x in (factors.left, factors.right))
    core = np.array(factors.core, dtype=np.float64)
    ends = [(lo, hi) for lo, hi, *_ in _panels(problem, factors, problem.residual_gram(factors))]
    for lo, hi in ends:
        for r in range(core.shape[0]):
            for k in (k for k in range(lo, hi) if kept[r, k]):
                residual = (np.asarray(problem.weight, np.float64) - left @ core @ right) @ root
                move = np.outer(left[:, r], right[k] @ root)
                if curvature := np.sum(move**2):
                    wanted = core[r, k] + np.sum(move * residual) / curvature
                    core[r, k] = np.clip(np.rint(wanted), -LARGEST, LARGEST)
    return factors.replace(core=core)
