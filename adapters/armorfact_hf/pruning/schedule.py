"""How long and how fast decoder blocks are tuned, and on which calibration windows."""

from __future__ import annotations

import math
from dataclasses import dataclass

FACTORS = ("left", "right", "values")  # the tensors of a layer that are tuned: A, B and the kept values of C
FIRST = 4  # times as many passes for the first block: what it is given is exact, and all others inherit its error
TAIL = 0.15  # of the rate, while the last blocks are tuned together
KEPT_ASIDE = 8  # one window in so many
WARM_UP = 5  # steps over which the rate rises, under a cosine that falls from the first step on, to LEAST of itself
LEAST = 0.1


@dataclass(frozen=True)
class Matching:
    """How factors are tuned (`armorfact_hf.pruning.tuning.matching`).

    Args:
        passes: over the windows that are not kept aside, one window a step.
        rate: what the learning rate stays below, a share of each factor's `armorfact_hf.pruning.tuning.muon.unit`.
    """

    passes: int
    rate: float

    def of(self, decoder_block: int) -> Matching:
        """How those of one block are."""
        return self if decoder_block else Matching(FIRST * self.passes, self.rate)

    @property
    def of_tail(self) -> Matching:
        """How those of the last blocks are, together."""
        return Matching(self.passes, TAIL * self.rate)

    def steps(self, windows: int) -> int:
        """How many windows train, every pass counted."""
        return self.passes * (windows - len(kept_aside(windows)))

    def rate_at(self, step: int, steps: int) -> float:
        """The learning rate of a step: a cosine, times a warm-up."""
        falling = LEAST + (1 - LEAST) * (1 + math.cos(math.pi * step / steps)) / 2
        return self.rate * min(1.0, (step + 1) / WARM_UP) * falling


def kept_aside(windows: int) -> range:
    """The windows that measure and do not train: one in eight, at least one; of a single window, none."""
    return range(min(KEPT_ASIDE, windows) - 1, windows, KEPT_ASIDE) if windows > 1 else range(0)
