"""All the work in this process."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from armorfact_hf.layers.linear import FactorizedLinear
from armorfact_hf.model.experts import put_layers_
from armorfact_hf.model.moments import Statistics
from armorfact_hf.model.structure import Layer
from armorfact_hf.pruning.experts import pool_
from armorfact_hf.pruning.job import Job
from armorfact_hf.pruning.layer import LayerReport, round_layer
from armorfact_hf.pruning.memory import experts_at_once
from armorfact_hf.pruning.progress import Progress
from armorfact_hf.pruning.resume.entry import Pruned
from armorfact_hf.pruning.side_by_side import Keep, forget, prune_layers, side_by_side, threads_each
from armorfact_hf.pruning.tuning.matching import BlockReport
from armorfact_hf.pruning.workers.flow import Flow
from armorfact_hf.pruning.workers.in_chunks import Gatherer, InChunks, chunks_of
from armorfact_hf.pruning.workers.tuning import (
    distance_from_aim,
    layers_by_name,
    tune_block,
    tune_tail,
    with_losses,
)


@dataclass(frozen=True)
class InProcess:
    """The workers of a run on one machine without others; see `Workers`.

    Args:
        job: what is pruned; its model is in evaluation mode, and its layers are replaced.
        progress: is told of every layer and window.
        flow: the states of all windows.
        experts_at_once: of each experts module, so many have their statistics in memory at a time; None is all.
    """

    job: Job
    progress: Progress
    flow: Flow
    experts_at_once: int | None = None

    @classmethod
    def of(cls, job: Job, progress: Progress, folder: Path | None = None) -> InProcess:
        """The workers of a job, before its first block; states wait in files of ``folder`` if there is one."""

        def told(index: int, window: int) -> None:
            progress.tell(1, f"decoder block {index + 1} of {len(job.blocks)}, window {window + 1}")

        return cls(job, progress, Flow.of(job, range(len(job.tokens)), told, folder), experts_at_once(job))

    def statistics(self, index: int | None) -> Statistics | InChunks:
        """The moments of the inputs of a block's layers, window by window; None is the head."""
        if index is not None:
            self.flow.begin(index)
        chunks = chunks_of(self.job.layers_of(index), self.experts_at_once)
        found = self._gathered(index, {layer.name for layer in chunks[0]})
        if index is not None and len(chunks) > 1:
            return InChunks.gathered(Gatherer(self.job, index, self.flow.before_block), chunks, found)
        pool_(found, chunks[0])
        return found

    def _gathered(self, index: int | None, names: Collection[str]) -> Statistics:
        """Those of some layers, while the dense model's states move on."""
        found = Statistics()
        for window in self.flow.windows:
            found.add(*(inputs.of(names) for inputs in self.flow.inputs(index, window)))
        return found

    def pass_by(self, index: int) -> None:
        """Move the dense model's states on through a block that needs no statistics."""
        self.flow.begin(index)
        self.flow.pass_by(index)

    def prune(
        self,
        layers: Sequence[Layer],
        statistics: Statistics | InChunks,
        keep: Keep = forget,
        known: Collection[str] = (),
    ) -> Pruned:
        """What replaces each of the layers; one that no token reaches (of an expert, say) is left as it is."""
        reached = [layer for layer in layers if layer.name in statistics.leader]
        threads = threads_each(reached, torch.get_num_threads())

        def done(layer: FactorizedLinear, report: LayerReport) -> None:
            keep(layer, report)
            self.progress.tell(1, report.name)

        found: Pruned = []
        for chunk in chunks_of([layer for layer in reached if layer.name not in known], self.experts_at_once):
            work = [(layer, statistics.of(layer.name)) for layer in chunk]
            found += prune_layers(work, self.job.config, done, threads)
            del work  # the next chunk takes its memory
        return found

    def match(self, index: int, pruned: Pruned, statistics: Statistics | InChunks) -> tuple[Pruned, BlockReport | None]:
        """The layers of a block, tuned together towards the states of the dense model behind it."""
        if self.job.matching is None or not pruned:
            return pruned, None
        self.replace(pruned)
        tuned = tune_block(self.job, index, layers_by_name(pruned), self.flow.around_block, self._told)
        found = with_losses(self.job, pruned, tuned, statistics.of), tuned[1]
        _rest(statistics)
        return found

    def match_tail(self, blocks: Sequence[tuple[Pruned, Statistics | InChunks]]) -> tuple[Pruned, BlockReport | None]:
        """The layers of the last blocks, tuned together towards the words of the dense model."""
        pruned = [layer for layers, _ in blocks for layer in layers]
        self.replace(pruned)
        tuned = tune_tail(self.job, layers_by_name(pruned), self.flow.around_tail, self._told)
        found: Pruned = []
        for layers, statistics in blocks:
            found += with_losses(self.job, layers, tuned, statistics.of)
            _rest(statistics)
        return found, tuned[1]

    def round(self, pruned: Pruned, statistics: Statistics | InChunks) -> Pruned:
        """The layers with their cores rounded to the dtype that the settings ask for; as they are, if to none."""
        config, dense = self.job.config, self.job.by_name
        if config.core_dtype is None:
            return pruned
        given, done = {report.name: (layer, report) for layer, report in pruned}, {}
        threads = threads_each([dense[name] for name in given], torch.get_num_threads())
        for chunk in chunks_of([dense[name] for name in given], self.experts_at_once):
            work = [(layer, *given[layer.name], statistics.of(layer.name), config) for layer in chunk]
            for rounded in side_by_side(round_layer, work, each=threads):
                done[rounded[1].name] = rounded
            del work  # the next chunk takes its memory
        _rest(statistics)
        return [done[name] for name in given]

    def distance(self, index: int | None, pruned: Pruned) -> float:
        """How far a block with these layers, or, with None, the last ones, is from what it was tuned towards."""
        self.replace(pruned)
        states = self.flow.around_tail if index is None else self.flow.around_block
        return distance_from_aim(self.job, index, states, self._told)

    def replace(self, pruned: Pruned) -> None:
        """Put pruned layers into the model."""
        put_layers_(self.job.model, layers_by_name(pruned))

    def advance(self, index: int) -> None:
        """Move the pruned model's states on through a block as it is now."""
        self.flow.advance(index)

    def follow_tail(self) -> None:
        """Bring the pruned model's states to where the blocks of the tail, as they are now, bring them."""
        self.flow.follow_tail()

    def _told(self, what: str) -> None:
        self.progress.tell(int(torch.is_grad_enabled()), what)


def _rest(statistics: Statistics | InChunks) -> None:
    """Those of another block are at work next."""
    if isinstance(statistics, InChunks):
        statistics.rest()
