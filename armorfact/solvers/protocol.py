"""What a solver is: two functions and the budgets it asks for."""

from __future__ import annotations

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


class Solver(Protocol):
    """A solver contributes ``init`` and ``step``.

    The driver calls ``init`` once and ``step`` until a budget is spent. It accepts a state only if
    its loss is not above the best so far, so a step may overshoot without harm. A run ends when
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

    def step(self, problem: Problem, state: Any) -> Any:
        """One sweep: a new state; the old one is not modified."""
