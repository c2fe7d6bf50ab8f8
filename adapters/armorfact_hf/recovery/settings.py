"""How a pruned model is recovered: one frozen record that is checked at once and kept with the result."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from armorfact_hf.pruning.schedule import FACTORS

TRAINED = {"factors": FACTORS, "wrappers": ("left", "right")}
LEAST = 0.1  # the share of the rate that the cosine ends at


@dataclass(frozen=True)
class RecoverySettings:
    """How the factors of the pruned layers are trained; the supports of their cores stay as they are.

    Args:
        train: "factors" trains A, B and the kept values of C; "wrappers" only A and B.
        steps: of one window each; None is one pass over the windows.
        rate: of Muon, at its highest, as a share of the root mean square of each factor.
        warm_up: steps over which the rate rises; then it falls as a cosine, to a tenth.
        measure_every: steps between two measurements on the windows kept aside, the best of which is the result.
        gradient_checkpointing: keep of each decoder block its input only, and compute the block again on the way back:
            less memory, a third more time.
        seed: of the order of the windows.

    Raises:
        ValueError: an unknown choice, or a number out of its range; the message names it.
    """

    train: str = "factors"
    steps: int | None = None
    rate: float = 1e-4
    warm_up: int = 10
    measure_every: int = 25
    gradient_checkpointing: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.train not in TRAINED:
            raise ValueError(f"train must be one of {', '.join(TRAINED)}, got {self.train!r}")
        for name, least in (("steps", 1), ("warm_up", 0), ("measure_every", 1), ("seed", 0)):
            value = getattr(self, name)
            if (name, value) != ("steps", None) and (type(value) is not int or value < least):
                raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")
        if isinstance(self.rate, bool) or not isinstance(self.rate, int | float) or not 0 < self.rate < math.inf:
            raise ValueError(f"rate must be a positive number, got {self.rate!r}")

    def rate_at(self, step: int, steps: int) -> float:
        """The rate of a step, from 0, of so many."""
        if step < self.warm_up:
            return self.rate * (step + 1) / self.warm_up
        done = (step - self.warm_up) / max(steps - self.warm_up, 1)
        return self.rate * (LEAST + (1 - LEAST) * (1 + math.cos(math.pi * done)) / 2)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)
