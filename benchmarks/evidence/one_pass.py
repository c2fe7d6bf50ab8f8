"""The ablation of the block coordinate descent: one solve each for A, B and the kept values, the mask left as it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from armorfact import Best, arrays, blocks
from armorfact.problem import Factors, Problem
from armorfact.steps.core import core_gradient
from armorfact.steps.left import left_step
from armorfact.steps.right import right_step

Array = Any


@dataclass(frozen=True)
class State:
    """A point and its loss."""

    factors: Factors
    loss: float


@dataclass(frozen=True)
class OnePass:
    """A solver whose step never changes the support.

    Args:
        iterations: of conjugate gradients, for the values. max_sweeps, rtol, patience: see `armorfact.Solver`.
    """

    iterations: int = 30
    max_sweeps: int = 1
    rtol: float = 0.0
    patience: int = 1

    def init(self, problem: Problem, factors: Factors, seed: int) -> State:
        """Nothing is random here: ``seed`` is not needed."""
        return State(factors, problem.loss(factors))

    def step(self, problem: Problem, state: State, best: Best) -> State:
        """A, then B, in closed form, then the values of C on its support; nothing falls back to ``best``."""
        factors, residual_gram = left_step(problem, state.factors)
        factors, _ = right_step(problem, factors, residual_gram)
        factors = solved_values(problem, factors, self.iterations)
        return State(factors, problem.loss(factors))


def solved_values(problem: Problem, factors: Factors, iterations: int) -> Factors:
    """Minimize the loss over the values of C at the entries that are not zero, by conjugate gradients.

    Each iteration is one product with the Gram matrix; the loss cannot rise.
    """
    support = arrays.namespace(factors.core).astype(factors.core != 0, factors.core.dtype)
    slope = -support * core_gradient(factors, problem.gram.multiply(problem.weight - factors.dense()))
    direction, norm = slope, arrays.total(slope * slope)
    for _ in range(iterations):
        if norm == 0:
            break
        moved = blocks.left_product(factors.left, blocks.right_product(direction, factors.right))
        curved = -support * core_gradient(factors, problem.gram.multiply(moved))
        step = norm / arrays.total(direction * curved)
        factors = factors.replace(core=factors.core + step * direction)
        slope = slope - step * curved
        old, norm = norm, arrays.total(slope * slope)
        direction = slope + (norm / old) * direction
    return factors
