"""Why a run ended: a kind that programs compare, and the sentence that people read."""

from __future__ import annotations

from enum import Enum


class Ending(Enum):
    """What ended a run."""

    CONVERGED = "converged"
    SOLVED = "solved exactly"
    SWEEP_LIMIT = "sweep limit"
    TIME_LIMIT = "time limit"
    CALLBACK = "stopped by the callback"
    ROUNDED = "rounded"


class Status(str):
    """The sentence, as an ordinary string, with its kind.

    Args:
        ending: what ended the run.
        sentence: the same for people, with what else has to be known about the result.

    >>> status = Status(Ending.SWEEP_LIMIT, "sweep limit of 7 reached")
    >>> print(status, status.ending is Ending.SWEEP_LIMIT)
    sweep limit of 7 reached True
    """

    ending: Ending

    def __new__(cls, ending: Ending, sentence: str) -> Status:
        status = super().__new__(cls, sentence)
        status.ending = ending
        return status

    def __getnewargs__(self) -> tuple[Ending, str]:  # type: ignore[override]
        return self.ending, str(self)

    def noting(self, *notes: str) -> Status:
        """The same ending, its sentence followed by the notes."""
        return Status(self.ending, "; ".join((self, *notes)))
