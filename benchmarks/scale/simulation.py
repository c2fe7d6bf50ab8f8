"""A run on many workers, from its costs: what each part takes, given what can be done at once and what cannot."""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil, log2

from armorfact_hf.pruning.schedule import Matching
from benchmarks.scale.costs import HIDDEN, Costs

STATE_BYTES, GRAM_BYTES, WEIGHT_BYTES = 2, 8, 2  # of an element: a state in bfloat16, a Gram matrix in float64
BLOCKS = 80  # of Llama 70B


@dataclass(frozen=True)
class Run:
    """What is simulated.

    Args:
        costs: of the large model. workers: how many.
        windows: of calibration. matching: how blocks are tuned, or None. bandwidth: of each machine, in bytes a second.
    """

    costs: Costs
    workers: int
    windows: int
    matching: Matching | None
    bandwidth: float

    def block(self, index: int) -> dict[str, float]:
        """Seconds of a decoder block, part by part."""
        in_turn = ceil(self.windows / self.workers) * self.costs.forward
        passes = 3 if self.matching else 2  # the pruned model twice, and the dense one
        parts = {"windows": passes * in_turn, "layers": self.layers(), "matching": 0.0, "spreading": self.spreading()}
        if self.matching is not None:
            steps = self.matching.of(index).steps(self.windows)
            states = 2 * self.windows * self.costs.length * HIDDEN * STATE_BYTES
            parts["matching"] = steps * self.costs.tuning + self.fetching(states)
        return parts

    def layers(self) -> float:
        """Gram matrices, then layers, each as soon as its Gram matrix is there; largest first."""
        costs, tokens = self.costs.layers, self.windows * self.costs.length
        gathering = {
            name: self.windows * x.gram + self.fetching(tokens * x.shape[1] * STATE_BYTES)
            for name, x in costs.items()
            if x.leader == name
        }
        pruning = {
            name: x.prune + self.fetching(GRAM_BYTES * x.shape[1] ** 2 + WEIGHT_BYTES * x.shape[0] * x.shape[1])
            for name, x in costs.items()
        }
        ready = finished(gathering, dict.fromkeys(gathering, 0.0), self.workers)
        return max(finished(pruning, {name: ready[x.leader] for name, x in costs.items()}, self.workers).values())

    def spreading(self) -> float:
        """A pruned block reaches all workers, twice as many in each round."""
        block = sum(WEIGHT_BYTES * x.shape[0] * x.shape[1] for x in self.costs.layers.values())
        return ceil(log2(self.workers)) * self.fetching(block)

    def fetching(self, size: float) -> float:
        """Seconds until so many bytes are where they are needed; a single worker has them."""
        return 0.0 if self.workers == 1 else size / self.bandwidth

    def days(self) -> float:
        """All blocks."""
        first, other = (sum(self.block(index).values()) for index in (0, 1))
        return (first + (BLOCKS - 1) * other) / 86400


def finished(seconds: Mapping[str, float], ready: Mapping[str, float], workers: int) -> dict[str, float]:
    """When each task ends, if the longest is begun first and none before it is ready."""
    free, ends = [0.0] * workers, {}
    for name in sorted(seconds, key=lambda name: (ready[name], -seconds[name])):
        start = max(heapq.heappop(free), ready[name])
        ends[name] = start + seconds[name]
        heapq.heappush(free, ends[name])
    return ends
