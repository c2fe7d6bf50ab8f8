"""The statistics of a decoder block whose experts have more second moments than memory holds: some are there at a time.

The calibration tokens go through the block once for each chunk of experts to sum up H_all, and once more for each chunk
whenever its moments are asked for: when its layers are pruned, and when losses are taken after the block was tuned. The
products and sums are those of a run without chunks, in the same order, and so are the bits.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from armorfact_hf.model.experts import ExpertLinear, dense_again, run_by_expert
from armorfact_hf.model.moments import Moments, Statistics
from armorfact_hf.model.structure import Layer
from armorfact_hf.pruning.experts import Pool, pools_of
from armorfact_hf.pruning.job import Job
from armorfact_hf.pruning.states import States


@dataclass(frozen=True)
class Gatherer:
    """Runs the calibration windows through a decoder block, as it is in the dense model, as often as it is asked to.

    Args:
        job: what is pruned. index: of the block. given: the states that it is given; they stay where they are.
    """

    job: Job
    index: int
    given: States

    def statistics(self, layers: Iterable[Layer]) -> Statistics:
        """Those of some of the block's layers, over all windows."""
        names = {layer.name for layer in layers}
        modules = self.job.modules_of(self.index)
        found = Statistics()
        with dense_again(self.job.model, modules), run_by_expert(modules):
            for window in range(len(self.job.tokens)):
                found.add(self.given.inputs(self.index, window, modules, advance=False).of(names))
        return found


@dataclass
class InChunks:
    """What `Statistics` are to a reader, of which one chunk is in memory.

    Args:
        gatherer: finds a chunk's. chunks: the experts' layers. pools: H_all, of all chunks.
        apart: the statistics of the layers that are no expert's.
        leader: as in `Statistics`. held: the statistics of the chunk at work, by its number.
    """

    gatherer: Gatherer
    chunks: Sequence[Sequence[Layer]]
    pools: Sequence[Pool]
    apart: Statistics
    leader: dict[str, str] = field(default_factory=dict)
    held: dict[int, Statistics] = field(default_factory=dict)

    @classmethod
    def gathered(cls, gatherer: Gatherer, chunks: Sequence[Sequence[Layer]], first: Statistics) -> InChunks:
        """Those of all chunks.

        Args:
            chunks: the layers of the block, see `chunks_of`.
            first: of the layers of the first chunk; those of experts are given up, so that no two chunks are in memory.
        """
        experts = [[layer for layer in chunk if layer.stack] for chunk in chunks]
        found = cls(gatherer, experts, pools_of(layer for chunk in experts for layer in chunk), first)
        found._count(first)
        first.drop([layer.name for layer in experts[0]])
        for chunk in experts[1:]:
            found._count(gatherer.statistics(chunk))
        for pool in found.pools:
            if pool.gram is not None:
                found.leader |= {name: name for name in pool.names if name not in found.leader}
        return found

    def of(self, name: str) -> Moments:
        """What is known of the inputs of one layer; the moments of another chunk are given up for it."""
        if name in self.apart.leader:
            return self.apart.of(name)
        [number] = [k for k, chunk in enumerate(self.chunks) if any(layer.name == name for layer in chunk)]
        if number not in self.held:
            self.held.clear()
            self.held[number] = self._shrunk(self.chunks[number])
        return self.held[number].of(name)

    def rest(self) -> None:
        """Give up the chunk at work: nobody asks for a while."""
        self.held.clear()

    def _count(self, statistics: Statistics) -> None:
        for pool in self.pools:
            pool.add(statistics)
        self.leader |= statistics.leader

    def _shrunk(self, chunk: Sequence[Layer]) -> Statistics:
        found, names = self.gatherer.statistics(chunk), {layer.name for layer in chunk}
        for pool in self.pools:
            replace(pool, names=[name for name in pool.names if name in names]).shrink_(found)
        return found


def chunks_of(layers: Sequence[Layer], experts: int | None) -> list[list[Layer]]:
    """The layers of a decoder block in chunks of so many experts, in order; the first has all that are no expert's.

    Args:
        experts: of each experts module, None for all of them.
    """
    found: dict[int, list[Layer]] = {0: []}
    for layer in layers:
        expert = layer.module.expert if isinstance(layer.module, ExpertLinear) else 0
        found.setdefault(expert // experts if experts else 0, []).append(layer)
    return [found[number] for number in sorted(found)]
