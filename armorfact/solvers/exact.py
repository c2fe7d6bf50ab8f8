"""The default solver: closed-form block steps with extrapolation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from armorfact import arrays
from armorfact.problem import Factors, Problem
from armorfact.solvers.protocol import Best
from armorfact.steps.core import core_step
from armorfact.steps.left import left_step
from armorfact.steps.right import right_step

Array = Any


@dataclass(frozen=True)
class Extrapolation:
    """How far beyond an accepted iterate the next sweep starts (after Ang and Gillis, 2019).

    Args:
        start: the first factor beta; 0 with ``growth`` 1 is plain alternation.
        growth: what an accepted sweep multiplies beta by.
        most: the largest beta.
        shrink: what a rejected sweep multiplies beta by.
    """

    start: float = 0.5
    growth: float = 1.05
    most: float = 1.0
    shrink: float = 0.5

    def accepted(self, beta: float) -> float:
        """The factor after an accepted sweep."""
        return min(self.most, beta * self.growth)

    def rejected(self, beta: float) -> float:
        """The factor after a rejected sweep."""
        return beta * self.shrink


@dataclass(frozen=True)
class ExactState:
    """The iterate, the point the next sweep starts from if it is accepted, and the extrapolation factor."""

    factors: Factors
    loss: float
    start: Factors
    beta: float


@dataclass(frozen=True)
class Exact:
    """Minimize over A, then B, then C, each block in closed form; repeat from an extrapolated point.

    Args:
        max_sweeps: sweeps at most.
        rtol, patience: a run ends after ``patience`` sweeps that each lower the loss by less than
            ``rtol`` of itself.
        extrapolation: the schedule of the extrapolation factor.
    """

    max_sweeps: int = 40
    rtol: float = 1e-3
    patience: int = 3
    extrapolation: Extrapolation = Extrapolation()

    def init(self, problem: Problem, factors: Factors, seed: int) -> ExactState:
        """Nothing is random here: ``seed`` is not needed."""
        loss = problem.loss(factors)
        return ExactState(factors=factors, loss=loss, start=factors, beta=self.extrapolation.start)

    def step(self, problem: Problem, state: ExactState, best: Best) -> ExactState:
        """One sweep from the extrapolated point; after one that was not accepted, from the best iterate."""
        start, beta = state.start, state.beta
        if state.factors is not best.factors:
            start, beta = best.factors, self.extrapolation.rejected(beta)
        factors, loss = sweep(problem, start)
        if not loss < best.loss:
            return ExactState(best.factors, best.loss, best.factors, self.extrapolation.rejected(beta))
        start = extrapolate(best.factors, factors, beta) if beta else factors
        return ExactState(factors, loss, start, self.extrapolation.accepted(beta))


def sweep(problem: Problem, factors: Factors) -> tuple[Factors, float]:
    """One exact step in each of A, B and C, and the loss after them.

    2.5 products of (d_out, d_in) by (d_in, d_in) in all: Z H for the left step, the update of R H
    in the right step, half a one for the gradient in the core step.
    """
    factors, residual_gram = left_step(problem, factors)
    factors, residual_gram = right_step(problem, factors, residual_gram)
    loss = arrays.total((problem.weight - factors.dense()) * residual_gram)
    factors, fallen = core_step(problem, factors, residual_gram)
    return factors, problem.resolved(loss - fallen, factors)


def extrapolate(old: Factors, new: Factors, beta: float) -> Factors:
    """``new + beta (new - old)``; core values only where both supports hold them, so N:M stays."""
    core = new.core - old.core
    core[(new.core == 0) | (old.core == 0)] = 0
    core *= beta
    core += new.core
    return Factors(
        left=new.left + beta * (new.left - old.left),
        core=core,
        right=new.right + beta * (new.right - old.right),
    )
