"""Who is told of runs in tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from armorfact_hf.observer import Observer, Step


class Silent(Observer):
    """Is told everything, and says nothing."""

    def say(self, sentence: str) -> None:
        """Nothing."""


class Stepping(Silent):
    """Hands every step to a function."""

    def __init__(self, act: Callable[[Step], object]) -> None:
        self.step = act


class Planned(Silent):
    """Hands the plan to a function."""

    def __init__(self, act: Callable[[Any], object]) -> None:
        self.plan = act
