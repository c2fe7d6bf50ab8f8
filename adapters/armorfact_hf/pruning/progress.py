"""How far a run is, and how long it took: the two things that move while everything else of it stands."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from armorfact_hf.observer import Observer, Step


@dataclass
class Progress:
    """Units of work, told to an observer.

    Args:
        observer: is told.
        total: units of the whole run.
        done: those of what was said to come next, but for the last.
    """

    observer: Observer
    total: int
    done: int = 0

    def tell(self, units: int, doing: str) -> None:
        """Say what comes next; it is counted as done when the next thing is said."""
        self.observer.step(Step(min(self.done, self.total), self.total, doing))
        self.done += units


@dataclass
class Clock:
    """Seconds of a run that may have been killed and continued.

    Args:
        earlier: that what was finished already took. start: of this run. lap_start: of the block at work.
    """

    earlier: float = 0.0
    start: float = field(default_factory=time.perf_counter)
    lap_start: float = field(default_factory=time.perf_counter)

    def lap(self) -> float:
        """Seconds since the last call, or since the start."""
        seconds, self.lap_start = self.seconds_of_lap, time.perf_counter()
        return seconds

    def resume_lap(self, seconds: float) -> None:
        """Count what an earlier run spent on the block at work."""
        self.earlier += seconds
        self.lap_start -= seconds

    @property
    def seconds_of_lap(self) -> float:
        """Seconds of the block at work so far."""
        return time.perf_counter() - self.lap_start

    def seconds(self) -> float:
        """Seconds of this run and of the work that it found finished."""
        return self.earlier + time.perf_counter() - self.start
