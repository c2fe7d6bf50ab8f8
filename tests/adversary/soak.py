"""How long the adversaries try, and the table that they print.

`make soak` runs the long form; ARMORFACT_SOAK_SEED, _SECONDS (of each adversary, at most), _MUTATIONS, _KILLS and
_PROBLEMS change it.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field


@dataclass
class Soak:
    """What one adversary tries: at most ``count`` times and for at most ``seconds``."""

    name: str
    count: int
    seconds: float
    seed: int = 0
    found: Counter[str] = field(default_factory=Counter)
    began: float | None = None  # with the first try

    @classmethod
    def long(cls, name: str, count: int) -> Soak:
        """As `make soak` asks for it."""
        number = {key: int(os.environ.get(f"ARMORFACT_SOAK_{key}", 0)) for key in (name.upper(), "SECONDS", "SEED")}
        return cls(name, number[name.upper()] or count, number["SECONDS"] or 3600, number["SEED"])

    def seeds(self) -> Iterator[int]:
        """A seed for each try, until count or time is used up."""
        self.began = time.monotonic()
        for number in range(self.count):
            if time.monotonic() - self.began > self.seconds:
                return
            yield self.seed * 10**9 + number

    def close(self, *zeros: str) -> None:
        """Print the line of the table; what is in ``zeros`` must not have happened."""
        assert self.began is not None and self.found, f"{self.name}: nothing was tried"
        cells = [*self.found.items(), *((zero, 0) for zero in zeros if zero not in self.found)]
        counts = " | ".join(f"{what} {number:,}" for what, number in cells)
        line = f"| {self.name} | {counts} | seconds {time.monotonic() - self.began:,.0f} | seed {self.seed} |"
        print(line, flush=True)
        assert not any(self.found[zero] for zero in zeros), line
