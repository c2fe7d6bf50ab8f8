"""What a solver is: two functions and the budgets it asks for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from armorfact.problem import Factors, Problem


class State(Protocol):
    """What ``step`` hands from one sweep to the next; a solver may keep more in it."""

    @property
    def factors(self) -> Factors:
        """The iterate; its core obeys the pattern."""

    @property
    def loss(self) -> float:
        """The loss of ``factors``."""


@dataclass(frozen=True)
class Best:
    """The best factors so far and their loss; the driver alone decides what they are."""

    factors: Factors
    loss: float


class Solver(Protocol):
    """A solver contributes ``init`` and ``step``.

    The driver calls ``init`` once and ``step`` until a budget is spent. It accepts a state only if
    its loss is below the best so far and the entries of A C B are in proportion to those of W, so a
    step may overshoot without harm. A state was accepted if ``best.factors is state.factors`` when
    the next step begins; a solver that wants to fall back goes on from ``best``. A run ends when
    ``patience`` steps in a row fail to lower the best loss by more than ``rtol`` times itself.
    """

    @property
    def max_sweeps(self) -> int:
        """Steps to take at most, unless the caller says otherwise."""

    @property
    def rtol(self) -> float:
        """The relative decrease below which a step counts as no progress."""

    @property
    def patience(self) -> int:
        """Steps without progress after which the run has converged."""

    def init(self, problem: Problem, factors: Factors, seed: int) -> Any:
        """The state that the first step starts from."""

    def step(self, problem: Problem, state: Any, best: Best) -> Any:
        """One sweep: a new state; the old one is not modified."""
