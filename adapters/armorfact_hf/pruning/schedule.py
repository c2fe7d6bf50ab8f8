"""How long and how fast a decoder block is tuned, and on which calibration windows."""

from __future__ import annotations

import math
from dataclasses import dataclass

FIRST = 4  # times as many passes over the first block: what it is given is exact, and all others inherit its error
KEPT_ASIDE = 8  # one window in so many
WARM_UP = 5  # steps over which the rate rises; then it falls as a cosine, to LEAST of itself
LEAST = 0.1


@dataclass(frozen=True)
class Matching:
    """How the factors of a block are tuned (`armorfact_hf.pruning.matching`).

    Args:
        passes: over the windows that are not kept aside, one window a step; for the first block `FIRST` times as many.
        rate: the largest learning rate.
        tail: the last so many blocks are tuned towards words.
    """

    passes: int
    rate: float
    tail: int = 0

    def passes_of(self, decoder_block: int) -> int:
        """Over the windows, while a block is tuned."""
        return self.passes * (1 if decoder_block else FIRST)

    def steps(self, decoder_block: int, windows: int) -> int:
        """How many windows train, every pass counted."""
        return self.passes_of(decoder_block) * (windows - len(kept_aside(windows)))

    def rate_at(self, step: int, steps: int) -> float:
        """The learning rate of a step: warm-up, then a cosine."""
        falling = LEAST + (1 - LEAST) * (1 + math.cos(math.pi * step / steps)) / 2
        return self.rate * min(1.0, (step + 1) / WARM_UP) * falling


def kept_aside(windows: int) -> range:
    """The windows that measure and do not train: one in eight, at least one; of a single window, none."""
    return range(min(KEPT_ASIDE, windows) - 1, windows, KEPT_ASIDE) if windows > 1 else range(0)
