"""The one loop: runs a solver within its budgets and keeps the best iterate."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real

from armorfact import arrays
from armorfact.problem import MOST_GROWTH, Factors, Problem
from armorfact.solvers.protocol import Best, Solver
from armorfact.status import Ending, Status


@dataclass(frozen=True)
class Progress:
    """What a callback is told after every sweep.

    Args:
        sweep: sweeps done; max_sweeps: the most there will be.
        loss: the best loss so far, as in the history of a `Result`; relative_loss: the same over the loss of the zero
            matrix.
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
        TypeError: ``max_sweeps`` or ``patience`` is no integer, or another budget no number.
        ValueError: a negative budget, or a ``patience`` of no sweeps.
    """

    max_sweeps: int
    rtol: float
    patience: int
    time_limit: float | None = None

    @classmethod
    def of(cls, solver: Solver, max_sweeps: int | None, rtol: float | None, time_limit: float | None) -> Budget:
        """What is given, and the solver's own where that is None."""
        return cls(
            max_sweeps=solver.max_sweeps if max_sweeps is None else max_sweeps,
            rtol=solver.rtol if rtol is None else rtol,
            patience=solver.patience,
            time_limit=time_limit,
        )

    def __post_init__(self) -> None:
        object.__setattr__(self, "max_sweeps", arrays.integer(self.max_sweeps, "max_sweeps"))
        object.__setattr__(self, "patience", arrays.integer(self.patience, "patience"))
        for name, value in (("rtol", self.rtol), ("time_limit", self.time_limit)):
            if not isinstance(value, Real | None):
                raise TypeError(f"{name} must be a number, got {value!r}")
        if self.patience < 1:
            raise ValueError(f"patience must be at least 1 sweep, got {self.patience}")
        if self.max_sweeps < 0 or not self.rtol >= 0 or not (self.time_limit is None or self.time_limit >= 0):
            raise ValueError(
                f"budgets must not be negative, got max_sweeps={self.max_sweeps}, "
                f"rtol={self.rtol}, time_limit={self.time_limit}"
            )


@dataclass(frozen=True)
class Run:
    """What the loop ends with: the best factors, the accepted sweeps, and why it ended."""

    factors: Factors
    history: tuple[Sweep, ...]
    status: Status


def run(
    solver: Solver,
    problem: Problem,
    factors: Factors,
    budget: Budget,
    seed: int,
    callback: Callable[[Progress], object] | None,
    reported: Callable[[float], float],
) -> Run:
    """Step until a budget is spent; a sweep whose loss is above the best is not accepted.

    ``reported`` turns a loss of the problem into the one that history and callback are told.
    """
    start = time.perf_counter()
    state = solver.init(problem, factors, seed)
    best = Best(state.factors, state.loss)
    history = [Sweep(0, reported(best.loss), time.perf_counter() - start)]
    idle = outsized = 0
    status = Status(Ending.SWEEP_LIMIT, f"sweep limit of {budget.max_sweeps} reached")
    for number in range(1, budget.max_sweeps + 1):
        state = solver.step(problem, state, best)
        seconds = time.perf_counter() - start
        lower = state.loss < best.loss
        accepted = lower and state.factors.in_proportion(problem.largest)
        outsized += lower and not accepted
        idle = 0 if accepted and best.loss - state.loss > budget.rtol * best.loss else idle + 1
        if accepted:
            best = Best(state.factors, state.loss)
            history.append(Sweep(number, reported(best.loss), seconds))
        relative = best.loss / (problem.weight_energy or 1.0)
        told = Progress(number, budget.max_sweeps, reported(best.loss), relative, seconds)
        ended = _ended(budget, best.loss, number, idle, seconds, callback is not None and callback(told))
        if ended:
            status = ended
            break
    if outsized:
        what = f"{outsized} sweeps ended with entries above {MOST_GROWTH:g} times those of W and were not accepted"
        status = status.noting(what)
    return Run(best.factors, tuple(history), status)


def _ended(budget: Budget, loss: float, sweeps: int, idle: int, seconds: float, stopped: object) -> Status | None:
    """Why the run ends after this sweep, if it does."""
    if stopped:
        return Status(Ending.CALLBACK, f"stopped by the callback after {sweeps} sweeps")
    if loss == 0:
        return Status(Ending.SOLVED, f"solved exactly after {sweeps} sweeps")
    if idle >= budget.patience:
        gains = f"the last {budget.patience} each gained less than {budget.rtol:g} of the loss"
        return Status(Ending.CONVERGED, f"converged after {sweeps} sweeps: {gains}")
    if budget.time_limit is not None and seconds >= budget.time_limit:
        return Status(Ending.TIME_LIMIT, f"time limit of {budget.time_limit:g} s reached after {sweeps} sweeps")
    return None
