r"""The core step: minimize the loss over the N:M core C, one group of M columns after another.

With :math:`T = A^\top A`, :math:`S = BHB^\top` and the gradient slice :math:`Q = -A^\top (RH) B^\top`, the loss as a
function of the group g of row r alone is

.. math:: t\,(c - c_{old})\,S_{gg}\,(c - c_{old})^\top + 2\,q\,(c - c_{old})^\top, \qquad t = T_{rr},\; q = Q_{r,g}.

With :math:`h = t\,S_{gg}c_{old} - q`, the support m has its optimum at :math:`(t S_{mm})^{-1} h_m` and gains
:math:`h_m^\top (t S_{mm})^{-1} h_m`. The group takes the best of all supports, the old one among them, so the loss
cannot rise; its change then moves the gradient of every group that it couples to.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from armorfact import arrays, blocks
from armorfact.arrays.sweeps import sweep_blocks
from armorfact.definite import unit_scale
from armorfact.gram import DiagonalGram, FullGram
from armorfact.pattern import Pattern
from armorfact.problem import Factors, Problem
from armorfact.steps.left import gram_root

Array = Any

# Columns that a compiled pass keeps in cache before the rest of the row is brought up to date.
PANEL = 64


def core_step(
    problem: Problem, factors: Factors, residual_gram: Array, visit: Array | None = None
) -> tuple[Factors, float]:
    """One pass over the groups of C, each replaced by its global optimum over supports and values.

    Blocks of A never interact, nor, when H is diagonal, do blocks of B: those go in parallel.

    Args:
        problem: the problem.
        factors: the factors to start from; their core obeys the pattern.
        residual_gram: R H at ``factors``, (d_out, d_in); it is overwritten.
        visit: (d_out, d_in / group) bool, the groups to replace; all of them if None.

    Returns:
        The factors with C replaced, and by how much the loss fell (>= 0).
    """
    if visit is None:
        visit = _all_groups(problem)
    if isinstance(problem.gram, DiagonalGram):
        return _independent_blocks(problem, factors, core_gradient(factors, residual_gram), visit)
    return _panels(problem, problem.gram, factors, residual_gram, visit)


def core_gradient(factors: Factors, residual_gram: Array) -> Array:
    """Q = -A' (R H) B', half the gradient of the loss in C, (d_out, d_in)."""
    half = blocks.right_product(residual_gram, arrays.transpose(factors.right))
    return blocks.left_product(-arrays.transpose(factors.left), half)


def _all_groups(problem: Problem) -> Array:
    xp = arrays.namespace(problem.weight)
    d_out, d_in = problem.weight.shape
    shape = (d_out, d_in // problem.pattern.group)
    return xp.ones(shape, dtype=xp.bool, device=arrays.device(problem.weight))


def wrapped_gram(problem: Problem, right: Array) -> Array:
    """S = B H B': (d_in, d_in), or (blocks, block_in, block_in) when H is diagonal."""
    if isinstance(problem.gram, DiagonalGram):
        energy = arrays.namespace(right).reshape(problem.gram.diagonal, (-1, 1, problem.block_in))
        return (right * energy) @ arrays.transpose(right)
    return _wrapped(problem.gram.matrix, right, right)


def _wrapped(gram: Array, above: Array, beside: Array) -> Array:
    """The rows and columns of S that belong to these blocks of B, of those of H."""
    return blocks.right_product(blocks.left_product(above, gram), arrays.transpose(beside))


def _independent_blocks(problem: Problem, factors: Factors, gradient: Array, visit: Array) -> tuple[Factors, float]:
    xp = arrays.namespace(gradient)
    rows, columns = problem.block_out, problem.block_in
    gram = wrapped_gram(problem, factors.right)
    core = xp.asarray(blocks.split_grid(factors.core, rows, columns), copy=True)
    fallen = _sweep(
        problem,
        xp.asarray(blocks.split_grid(gradient, rows, columns), copy=True),
        core,
        blocks.split_grid(visit, rows, columns // problem.pattern.group),
        arrays.transpose(factors.left) @ factors.left,
        gram,
        support_inverses(blocks.diagonal_blocks(gram, problem.pattern.group), problem.pattern),
    )
    return factors.replace(core=blocks.join_grid(core)), fallen


def _panels(
    problem: Problem, h: FullGram, factors: Factors, residual_gram: Array, visit: Array
) -> tuple[Factors, float]:
    """Panels of columns from left to right, the gradient of each formed when it is its turn.

    What the panels before carry to it, (d_out, k) @ (k, panel), is all the large arithmetic there
    is. T times the change of the core takes the place of the columns of R H already used. S never
    stands in memory: a panel needs the columns of S that are its own, down to its end.
    """
    xp = arrays.namespace(residual_gram)
    on_diagonal = factors.right @ h.diagonal_blocks(problem.block_in) @ arrays.transpose(factors.right)
    group = problem.pattern.group
    groups = xp.reshape(blocks.diagonal_blocks(on_diagonal, group), (-1, group, group))
    inverses = support_inverses(groups, problem.pattern)
    left_gram = arrays.transpose(factors.left) @ factors.left
    core = xp.asarray(factors.core, copy=True)
    carried = residual_gram
    fallen = 0.0
    for lo, hi, gradient, gram in gradient_panels(problem, h, factors, residual_gram):
        if lo:
            gradient += carried[:, :lo] @ gram[:lo, :]
        groups = slice(lo // problem.pattern.group, hi // problem.pattern.group)
        block = xp.asarray(blocks.split_rows(core[:, lo:hi], problem.block_out)[:, None, ...], copy=True)
        fallen += _sweep(
            problem,
            xp.asarray(blocks.split_rows(gradient, problem.block_out)[:, None, ...], copy=True),
            block,
            blocks.split_rows(visit[:, groups], problem.block_out)[:, None, ...],
            left_gram,
            xp.asarray(gram[lo:hi, :][None, ...], copy=True),
            inverses[groups, ...][None, ...],
        )
        new = blocks.join_rows(block[:, 0, ...])
        change = blocks.split_rows(new - core[:, lo:hi], problem.block_out)
        carried[:, lo:hi] = blocks.join_rows(left_gram @ change)
        core[:, lo:hi] = new
    return factors.replace(core=core), fallen


def gradient_panels(
    problem: Problem, h: FullGram, factors: Factors, residual_gram: Array
) -> Iterator[tuple[int, int, Array, Array]]:
    """(lo, hi, Q[:, lo:hi], S[:, lo:hi] down to row hi at least) from left to right.

    Q and S are formed for whole blocks of B at a time.
    """
    size, group = problem.block_in, problem.pattern.group
    panel = max(PANEL // group, 1) * group
    at_once = max(panel // size, 1)
    for j in range(0, factors.right.shape[0], at_once):
        end = min(j + at_once, factors.right.shape[0])
        right, start, stop = factors.right[j:end, ...], j * size, end * size
        gradient = core_gradient(factors.replace(right=right), residual_gram[:, start:stop])
        gram = _wrapped(h.matrix[:stop, start:stop], factors.right[:end, ...], right)
        for lo in range(start, stop, panel):
            hi = min(lo + panel, stop)
            yield lo, hi, gradient[:, lo - start : hi - start], gram[:, lo - start : hi - start]


def _sweep(
    problem: Problem,
    gradient: Array,
    core: Array,
    visit: Array,
    left_gram: Array,
    gram: Array,
    inverses: Array,
) -> float:
    xp = arrays.namespace(core)
    supports = xp.asarray(problem.pattern.supports, device=arrays.device(core))
    visit = xp.asarray(visit, copy=True)
    return arrays.total(sweep_blocks(gradient, core, visit, left_gram, gram, inverses, supports))


def support_inverses(group_gram: Array, pattern: Pattern) -> Array:
    """S_mm^-1 for every group and support, (..., groups, supports, N, N) float64.

    A direction that S_mm does not see beyond rounding (dead channels, a singular B) gets a zero
    instead, which yields the optimum with that value at zero.
    """
    xp = arrays.namespace(group_gram)
    keep = pattern.keep
    pairs = [a * pattern.group + b for m in pattern.supports for a in m for b in m]
    flat = xp.reshape(group_gram, (*group_gram.shape[:-2], pattern.group**2))
    picked = xp.take(flat, xp.asarray(pairs, device=arrays.device(flat)), axis=-1)
    picked = xp.reshape(picked, (*flat.shape[:-1], len(pattern.supports), keep, keep))
    return _guarded_inverse(arrays.float64(picked), 10 * arrays.epsilon(group_gram))


def _guarded_inverse(matrix: Array, tolerance: float) -> Array:
    """A reflexive generalized inverse of small positive semidefinite matrices, (..., n, n).

    Scaled to unit diagonal, then Goodnight's sweep operator (The American Statistician 33, 1979),
    passing over every pivot that is not above ``tolerance``.
    """
    xp = arrays.namespace(matrix)
    scale = unit_scale(matrix)
    outer = scale[..., :, None] * scale[..., None, :]
    swept = matrix * outer
    for k in range(matrix.shape[-1]):
        pivot = swept[..., k : k + 1, k : k + 1]
        usable = pivot > tolerance
        inverse = xp.where(usable, 1.0 / xp.where(usable, pivot, xp.ones_like(pivot)), xp.zeros_like(pivot))
        row = swept[..., k : k + 1, :] * inverse
        column = swept[..., :, k : k + 1]
        swept = swept - column * row
        swept[..., k : k + 1, :] = row
        swept[..., :, k : k + 1] = -column * inverse
        swept[..., k : k + 1, k : k + 1] = inverse
    return swept * outer


def core_step_naive(problem: Problem, factors: Factors) -> Factors:
    """Twin of `core_step` in NumPy: every support of every group by least squares, from scratch.

    The groups are visited in the same order; nothing is carried from one to the next.
    """
    root = gram_root(problem)
    weight = np.asarray(problem.weight, dtype=np.float64)
    left, right = (np.asarray(blocks.dense(x), dtype=np.float64) for x in (factors.left, factors.right))
    core = np.array(factors.core, dtype=np.float64)
    group = problem.pattern.group
    size = problem.block_in
    if isinstance(problem.gram, DiagonalGram):
        panels = [(lo, lo + size) for lo in range(0, core.shape[1], size)]
    else:
        panels = [(lo, hi) for lo, hi, *_ in gradient_panels(problem, problem.gram, factors, factors.core)]
    for start, stop in panels:
        for r in range(core.shape[0]):
            for lo in range(start, stop, group):
                columns = slice(lo, lo + group)
                core[r, columns] = 0
                target = (weight - left @ core @ right) @ root
                core[r, columns] = best_group(target, left[:, r], right[columns] @ root, problem.pattern)
    return replace(factors, core=core)


def best_group(target: np.ndarray, column: np.ndarray, rows: np.ndarray, pattern: Pattern) -> np.ndarray:
    """Brute force: the (M,) values ``c`` of the pattern minimizing ||target - column c rows||."""
    best, best_loss = np.zeros(pattern.group), np.inf
    for support in map(list, pattern.supports):
        system = np.kron(column[:, None], rows[support].T)
        values = np.linalg.lstsq(system, target.reshape(-1), rcond=None)[0]
        loss = np.sum((target.reshape(-1) - system @ values) ** 2)
        if loss < best_loss * (1 - 1e-12):
            best, best_loss = np.zeros(pattern.group), loss
            best[support] = values
    return best
