"""What the paper ran: Adam on A, B and the values of C, and one group of every block an iteration.

ARMOR (arXiv 2510.05528), Algorithm 1: the baseline that the exact solver is measured against.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from armorfact import arrays, blocks
from armorfact.problem import Factors, Problem
from armorfact.solvers.groups import one_group_step
from armorfact.solvers.protocol import Best
from armorfact.steps.core import core_gradient

Array = Any


@dataclass(frozen=True)
class AdamState:
    """The iterate, its loss, Adam's two moments of each factor, and the iteration count."""

    factors: Factors
    loss: float
    first: tuple[Array, Array, Array]
    second: tuple[Array, Array, Array]
    seed: int
    steps: int = 0


@dataclass(frozen=True)
class Adam:
    """Adam (Kingma and Ba, arXiv 1412.6980) with the paper's group step.

    Args:
        learning_rate, beta1, beta2, epsilon: Adam's own.
        max_sweeps, rtol, patience: the paper's stopping rule, see `armorfact.Solver`.
    """

    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    max_sweeps: int = 20_000
    rtol: float = 1e-6
    patience: int = 100

    def init(self, problem: Problem, factors: Factors, seed: int) -> AdamState:
        """Zero moments at the starting point."""
        xp = arrays.namespace(factors.core)
        parts = (factors.left, factors.core, factors.right)
        zeros = tuple(xp.zeros_like(x) for x in parts)
        return AdamState(factors, problem.loss(factors), zeros, zeros, seed)

    def step(self, problem: Problem, state: AdamState, best: Best) -> AdamState:
        """One Adam step in all factors at once, then one group of every block."""
        steps = state.steps + 1
        factors = state.factors
        grads = gradients(problem, factors)
        first = _blend(state.first, grads, self.beta1)
        second = _blend(state.second, tuple(g * g for g in grads), self.beta2)
        moved = [
            part - self._change(m, v, steps)
            for part, m, v in zip((factors.left, factors.core, factors.right), first, second, strict=True)
        ]
        xp = arrays.namespace(factors.core)
        moved[1] = xp.where(factors.core != 0, moved[1], factors.core)
        rng = np.random.default_rng((state.seed, steps))
        factors, loss = one_group_step(problem, Factors(*moved), rng)
        return AdamState(factors, loss, first, second, state.seed, steps)

    def _change(self, first: Array, second: Array, steps: int) -> Array:
        corrected = first / (1 - self.beta1**steps)
        scale = (second / (1 - self.beta2**steps)) ** 0.5 + self.epsilon
        return self.learning_rate * corrected / scale


def _blend(old: tuple[Array, ...], new: tuple[Array, ...], beta: float) -> tuple[Array, ...]:
    return tuple(beta * x + (1 - beta) * y for x, y in zip(old, new, strict=True))


def gradients(problem: Problem, factors: Factors) -> tuple[Array, Array, Array]:
    """dL/dA, dL/dC (on the support) and dL/dB, in the shapes of the factors."""
    xp = arrays.namespace(factors.core)
    residual_gram = problem.residual_gram(factors)
    inner = blocks.split_rows(blocks.right_product(factors.core, factors.right), problem.block_out)
    outer = blocks.split_columns(blocks.left_product(factors.left, factors.core), problem.block_in)
    left = blocks.split_rows(residual_gram, problem.block_out) @ arrays.transpose(inner)
    right = arrays.transpose(outer) @ blocks.split_columns(residual_gram, problem.block_in)
    core = 2 * core_gradient(factors, residual_gram)
    return -2 * left, xp.where(factors.core != 0, core, xp.zeros_like(core)), -2 * right
