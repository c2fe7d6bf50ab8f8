"""Who is told how a job goes: one object, handed down from the caller to whatever takes time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from armorfact_hf.pruning.plan import Plan


Log = Callable[[str], None]  # takes a sentence
Count = Callable[[int, int], object]  # takes the times that something was done, and those there will be


@dataclass(frozen=True)
class Step:
    """How far a job is: ``done`` of ``total`` units of work, and what comes next."""

    done: int
    total: int
    doing: str


class Observer:
    """Is told of a job as it goes; override what is of interest.

    As it stands it prints sentences, and ignores all else.
    """

    def say(self, sentence: str) -> None:
        """A slow step begins, or something worth knowing was found."""
        print(sentence)

    def plan(self, plan: Plan) -> None:
        """What pruning is going to do, before it starts."""

    def step(self, step: Step) -> None:
        """A unit of work begins."""

    def counts(self, doing: str) -> Count:
        """What tells `step` of something that is done many times."""
        return lambda done, total: self.step(Step(done, total, doing))

    @property
    def wants_plan(self) -> bool:
        """Whether `plan` does anything: where it does not, no time is spent on measuring for one."""
        return type(self).plan is not Observer.plan
