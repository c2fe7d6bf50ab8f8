"""The one loop: runs a solver within its budgets and keeps the best iterate."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from armorfact.problem import Factors, Problem
from armorfact.solvers.protocol import Solver


@dataclass(frozen=True)
class Progress:
    """What a callback is told after every sweep.

    Args:
        sweep: sweeps done; max_sweeps: the most there will be.
        loss: the best loss so far; relative_loss: the same over the loss of the zero matrix.
        seconds: since the solver started.
    """

    sweep: int
    max_sweeps: int
    loss: float
    relative_loss: float
    seconds: float


@dataclass(frozen=True)
class Sweep:
    """An accepted sweep: its number, the loss after it, and the seconds since the start."""

    number: int
    loss: float
    seconds: float


@dataclass(frozen=True)
class Budget:
    """When to stop; each field is checked after every sweep.

    Raises:
        ValueError: a negative budget.
    """

    max_sweeps: int
    rtol: float
    patience: int
    time_limit: float | None = None

    def __post_init__(self) -> None:
        if self.max_sweeps < 0 or not self.rtol >= 0 or (self.time_limit is not None and self.time_limit < 0):
            raise ValueError(
                f"budgets must not be negative, got max_sweeps={self.max_sweeps}, "
                f"rtol={self.rtol}, time_limit={self.time_limit}"
            )


@dataclass(frozen=True)
class Run:
    """What the loop ends with: the best factors, the accepted sweeps, and why it ended."""

    factors: Factors
    history: tuple[Sweep, ...]
    status: str


def run(
    solver: Solver,
    problem: Problem,
    factors: Factors,
    budget: Budget,
    seed: int,
    callback: Callable[[Progress], object] | None,
) -> Run:
    """Step until a budget is spent; a sweep whose loss is above the best is not accepted."""
    start = time.perf_counter()
    state = solver.init(problem, factors, seed)
    best, best_loss = state.factors, state.loss
    history = [Sweep(0, best_loss, time.perf_counter() - start)]
    idle = 0
    for number in range(1, budget.max_sweeps + 1):
        state = solver.step(problem, state)
        seconds = time.perf_counter() - start
        progress = best_loss - state.loss > budget.rtol * best_loss
        idle = 0 if progress else idle + 1
        if state.loss < best_loss:
            best, best_loss = state.factors, state.loss
            history.append(Sweep(number, best_loss, seconds))
        told = Progress(number, budget.max_sweeps, best_loss, best_loss / (problem.weight_energy or 1.0), seconds)
        if callback is not None and callback(told):
            return Run(best, tuple(history), f"stopped by the callback after {number} sweeps")
        if best_loss == 0 or idle >= budget.patience:
            return Run(best, tuple(history), _converged(best_loss, budget, number))
        if budget.time_limit is not None and seconds >= budget.time_limit:
            return Run(best, tuple(history), f"time limit of {budget.time_limit:g} s reached after {number} sweeps")
    return Run(best, tuple(history), f"sweep limit of {budget.max_sweeps} reached")


def _converged(loss: float, budget: Budget, sweeps: int) -> str:
    if loss == 0:
        return f"solved exactly after {sweeps} sweeps"
    return (
        f"converged after {sweeps} sweeps: the last {budget.patience} each gained less than {budget.rtol:g} of the loss"
    )
