"""The paper's theoretical algorithm: sequential gradient steps of length 1/beta, and a group step.

ARMOR (arXiv 2510.05528), Algorithm 2 and Theorem 3.1: the loss never rises.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from armorfact import arrays
from armorfact.problem import Factors, Problem
from armorfact.solvers.groups import one_group_step
from armorfact.solvers.protocol import Best
from armorfact.steps.core import core_gradient
from armorfact.steps.left import LeftProducts
from armorfact.steps.right import sweep_right
from armorfact.steps.smoothness import core_smoothness, left_smoothness, right_smoothness

Array = Any


@dataclass(frozen=True)
class GradientState:
    """The iterate, its loss, and how many steps led to it."""

    factors: Factors
    loss: float
    seed: int
    steps: int = 0


@dataclass(frozen=True)
class Gradient:
    """Gradient steps of length 1/beta in A, each B_j and C, then one group a block.

    Args:
        max_sweeps, rtol, patience: the budgets, see `armorfact.Solver`.
    """

    max_sweeps: int = 2000
    rtol: float = 1e-6
    patience: int = 20

    def init(self, problem: Problem, factors: Factors, seed: int) -> GradientState:
        """The starting point."""
        return GradientState(factors, problem.loss(factors), seed)

    def step(self, problem: Problem, state: GradientState, best: Best) -> GradientState:
        """One round over A, B, C and a random group of every block."""
        rng = np.random.default_rng((state.seed, state.steps))
        factors, residual_gram = left_gradient_step(problem, state.factors)
        factors, residual_gram = right_gradient_step(problem, factors, residual_gram)
        factors = core_gradient_step(problem, factors, residual_gram)
        factors, loss = one_group_step(problem, factors, rng)
        return GradientState(factors, loss, state.seed, state.steps + 1)


def left_gradient_step(problem: Problem, factors: Factors) -> tuple[Factors, Array]:
    """A_i + (2 / beta_A,i) E_i for every block; returns the factors and R H there."""
    products = LeftProducts(problem, factors)
    step = _step(left_smoothness(products.gram), products.slope)
    return products.move(factors.left + step[:, None, None] * products.slope)


def right_gradient_step(problem: Problem, factors: Factors, residual_gram: Array) -> tuple[Factors, Array]:
    """B_j + (2 / beta_B,j) G_j' (R H)_j for one block after another; ``residual_gram`` is overwritten."""

    def update(outer_gram: Array, slope: Array, input_gram: Array) -> Array:
        return _step(right_smoothness(outer_gram, input_gram), slope)[..., None, None] * slope

    return sweep_right(problem, factors, residual_gram, update)


def core_gradient_step(problem: Problem, factors: Factors, residual_gram: Array) -> Factors:
    """C - (2 / beta_C) Q on the support of C."""
    xp = arrays.namespace(factors.core)
    beta = core_smoothness(problem, factors)
    if beta == 0:
        return factors
    gradient = core_gradient(factors, residual_gram)
    masked = xp.where(factors.core != 0, gradient, xp.zeros_like(gradient))
    return factors.replace(core=factors.core - (2 / beta) * masked)


def _step(beta: Array, like: Array) -> Array:
    """2 / beta, and zero where the curvature is: the slope vanishes there."""
    xp = arrays.namespace(beta)
    safe = xp.where(beta > 0, beta, xp.ones_like(beta))
    return xp.astype(xp.where(beta > 0, 2 / safe, xp.zeros_like(beta)), like.dtype, copy=False)
