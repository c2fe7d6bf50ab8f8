"""The statistics of a decoder block, in Ray's object store."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from armorfact_hf.model.structure import Layer
from armorfact_hf.pruning.experts import pools_of
from armorfact_hf.pruning.workers import remote
from armorfact_hf.pruning.workers.hands import Hands
from armorfact_hf.pruning.workers.remote import Ref


@dataclass(frozen=True)
class Gathered:
    """The statistics of a block.

    Args:
        leader: as in `Statistics`. moments: of each leader, a reference.
        hands: who works on them.
    """

    leader: dict[str, str]
    moments: dict[str, Ref]
    hands: Hands

    def of(self, name: str) -> Ref:
        """Refers to what is known of the inputs of one layer."""
        return self.moments[self.leader[name]]

    def pool_(self, layers: Iterable[Layer]) -> None:
        """`armorfact_hf.pruning.experts.pool_`, where the moments are."""
        for pool in pools_of(layers):
            leaders, unreached = pool.leaders(self.leader), pool.unreached(self.leader)
            if not leaders:  # they are left as they are
                continue
            prior = self.hands.do(remote.prior, 1, [self.moments[name] for name in leaders])
            for name in leaders:
                self.moments[name] = self.hands.do(remote.lend, 1, self.moments[name], prior)
            for name in unreached:
                self.leader[name], self.moments[name] = unreached[0], prior
