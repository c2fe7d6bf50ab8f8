"""Minimize over A and B alone, for a core that must stay as it is: one that is rounded."""

from __future__ import annotations

from dataclasses import dataclass

from armorfact import arrays
from armorfact.problem import Factors, Problem
from armorfact.solvers.protocol import Best
from armorfact.steps.left import left_step
from armorfact.steps.right import right_step


@dataclass(frozen=True)
class WrappersState:
    """The iterate and its loss."""

    factors: Factors
    loss: float


@dataclass(frozen=True)
class Wrappers:
    """Alternate the exact steps in A and in B; C stays.

    Args:
        max_sweeps, rtol, patience: as of `armorfact.Exact`.
    """

    max_sweeps: int = 4
    rtol: float = 1e-2
    patience: int = 1

    def init(self, problem: Problem, factors: Factors, seed: int) -> WrappersState:
        """Nothing is random here: ``seed`` is not needed."""
        return WrappersState(factors, problem.loss(factors))

    def step(self, problem: Problem, state: WrappersState, best: Best) -> WrappersState:
        """One step in A and one in B, from the best iterate."""
        factors, residual_gram = left_step(problem, best.factors)
        factors, residual_gram = right_step(problem, factors, residual_gram)
        loss = arrays.total((problem.weight - factors.dense()) * residual_gram)
        return WrappersState(factors, problem.resolved(loss, factors))
