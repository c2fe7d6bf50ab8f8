"""The sequential loop: gather a decoder block's statistics, prune its layers, and run what comes out of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from armorfact_hf.layers.linear import FactorizedLinear
from armorfact_hf.model.on_disk import HEAD
from armorfact_hf.model.structure import Layer
from armorfact_hf.pruning.job import Job
from armorfact_hf.pruning.layer import LayerReport
from armorfact_hf.pruning.progress import Clock, Progress
from armorfact_hf.pruning.resume.entry import Finished, Pruned
from armorfact_hf.pruning.resume.journal import Journal, layer_key
from armorfact_hf.pruning.spilled import set_aside
from armorfact_hf.pruning.tuning.matching import BlockReport
from armorfact_hf.pruning.workers.protocol import Workers


@dataclass(frozen=True)
class BlockByBlock:
    """The loop over the decoder blocks: their order, the journal, the reports. Workers do all that computes.

    Only one block's statistics are in memory at a time, but for the last blocks: they wait to be tuned once more,
    together. Nothing follows these but a norm and the head, so words can be looked at.

    Args:
        job: what is pruned; its model is in evaluation mode, and its layers are replaced.
        journal: where finished blocks are kept, or None.
        workers: hold the states of the windows.
        progress, clock: how far the run is. They move on.
        blocks: how each decoder block was tuned. It grows.
        waiting: for each of the last blocks, its layers, tuned by themselves, and the statistics of their inputs.
        folder: for files of what waits, or None.
    """

    job: Job
    journal: Journal | None
    workers: Workers[Any]
    progress: Progress
    clock: Clock
    blocks: list[BlockReport] = field(default_factory=list)
    waiting: list[tuple[Pruned, Any]] = field(default_factory=list)
    folder: Path | None = None

    def reports(self) -> tuple[LayerReport, ...]:
        """Prune every block, tune the last ones once more, and prune the head; the reports of their layers."""
        found: dict[str, LayerReport] = {}
        for index in range(self.job.last_block + 1):
            with self.job.weights.held(index):
                found |= self._prune_block(index, self.job.layers_of(index))
        with self.job.weights.held(*self.job.tail, *([HEAD] if self.job.uses_head else [])):
            found |= self._tune_tail()
            found |= self._prune_head(self.job.layers_of(None))
        self.progress.tell(0, "done")
        return tuple(found.values())

    @cached_property
    def finished_tail(self) -> Finished | None:
        """What a killed run left of the last blocks, tuned together."""
        return self._finished("tail")

    def _prune_block(self, index: int, layers: list[Layer]) -> dict[str, LayerReport]:
        key = f"block-{index:04}"
        pruned = self._restored(key) if layers else []
        waits = index in self.job.tail and not self.finished_tail
        known = self._known(key) if pruned is None else []
        if pruned is not None:
            self._tell_finished(index, layers)
        if pruned is None or waits:
            statistics = self.workers.statistics(index)
            if pruned is None:
                factorized = self._factorized(key, layers, statistics, known)
                pruned, matched = self.workers.match(index, factorized, statistics)
                if index not in self.job.tail:  # integers cannot be tuned: the tail is rounded when that is done
                    pruned = self.workers.round(pruned, statistics)
                    matched = self._as_stored(index, pruned, matched)
                pruned = self._kept(key, pruned, matched)
            if waits:
                self.waiting.append((pruned, set_aside(statistics, self.folder)))
        else:
            self.workers.pass_by(index)
        self.workers.replace(pruned)
        if index < self.job.last_block or self.job.config.head:
            self.workers.advance(index)
        reports = _reports(pruned)
        if not waits:
            self.job.let_go(reports)
        return reports

    def _factorized(self, key: str, layers: list[Layer], statistics: Any, known: Pruned) -> Pruned:
        """What replaces the layers of a block; each stands in the journal once it is done.

        Args:
            known: what an earlier process found of it.
        """
        places = {layer.name: place for place, layer in enumerate(layers)}

        def keep(layer: FactorizedLinear, report: LayerReport) -> None:
            if self.journal is not None:
                kept = Finished([(layer, report)], self.clock.seconds_of_lap)
                self.journal.write(layer_key(key, places[report.name]), kept)

        for name in _reports(known):
            self.progress.tell(1, f"{name} is finished already")
        found = self.workers.prune(layers, statistics, keep, _reports(known))
        return sorted([*known, *found], key=lambda pruned: places[pruned[1].name])

    def _known(self, key: str) -> Pruned:
        """What a killed run left of a block that it did not finish."""
        kept = [] if self.journal is None else self.journal.layers_of(key, self.job.model.device)
        self.clock.resume_lap(max((one.seconds for one in kept), default=0.0))
        return [pruned for one in kept for pruned in one.layers]

    def _tune_tail(self) -> dict[str, LayerReport]:
        """Tune the last blocks together towards the dense model's words; the reports of their layers."""
        if not self.job.tail:
            return {}
        if self.finished_tail is None:
            reached = any(layers for layers, _ in self.waiting)
            pruned, matched = self.workers.match_tail(self.waiting) if reached else ([], None)
            pruned = self._rounded_tail(pruned)
            pruned = self._kept("tail", pruned, self._as_stored(None, pruned, matched))
        else:
            self.progress.tell(self.job.tail_steps, "the last blocks are tuned already")
            pruned = self._counted(self.finished_tail)
        self.waiting.clear()
        self.workers.replace(pruned)
        if self.job.config.head:
            self.workers.follow_tail()
        self.job.let_go(_reports(pruned))
        return _reports(pruned)

    def _as_stored(self, index: int | None, rounded: Pruned, matched: BlockReport | None) -> BlockReport | None:
        """The report of a block, or, with None, of the last ones, with its distance after rounding."""
        if matched is None or self.job.config.core_dtype is None:
            return matched
        return replace(matched, rounded=self.workers.distance(index, rounded))

    def _rounded_tail(self, pruned: Pruned) -> Pruned:
        tuned = {report.name: (layer, report) for layer, report in pruned}
        return [
            rounded
            for layers, statistics in self.waiting
            for rounded in self.workers.round([tuned[report.name] for _, report in layers], statistics)
        ]

    def _prune_head(self, layers: list[Layer]) -> dict[str, LayerReport]:
        if not layers:
            return {}
        pruned = self._restored("head")
        if pruned is None:
            statistics = self.workers.statistics(None)
            pruned = self._kept("head", self.workers.round(self.workers.prune(layers, statistics), statistics))
        else:
            self.progress.tell(len(layers), "the head is finished already")
        self.workers.replace(pruned)
        return _reports(pruned)

    def _finished(self, key: str) -> Finished | None:
        """What the journal holds under ``key``."""
        return None if self.journal is None else self.journal.read(key, self.job.model.device)

    def _restored(self, key: str) -> Pruned | None:
        finished = self._finished(key)
        return None if finished is None else self._counted(finished)

    def _counted(self, finished: Finished) -> Pruned:
        self.clock.earlier += finished.seconds
        self._note(finished.matched)
        return finished.layers

    def _tell_finished(self, index: int, layers: Sequence[Layer]) -> None:
        """Count a block without work as done."""
        why = "is finished already" if layers else "has no layer to prune"
        steps = self.job.tuning_steps.get(index, 0)
        self.progress.tell(len(layers) + steps, f"decoder block {index + 1} {why}")

    def _kept(self, key: str, pruned: Pruned, matched: BlockReport | None = None) -> Pruned:
        """The pruned layers, once they stand in the journal."""
        if self.journal is not None:
            self.journal.write(key, Finished(pruned, self.clock.lap(), matched))
        self._note(matched)
        return pruned

    def _note(self, matched: BlockReport | None) -> None:
        if matched is not None:
            self.blocks.append(matched)


def _reports(pruned: Pruned) -> dict[str, LayerReport]:
    return {report.name: report for _, report in pruned}


def units(job: Job) -> int:
    """The units of work of a run: a layer, and a window through a block, forward or back."""
    passes = (2 * job.follows_pruned + job.follows_dense) * (job.last_block + 1)
    passes -= job.follows_pruned and not job.config.head  # nothing needs what the last block makes of it
    tuning = sum(job.tuning_steps.values()) + job.tail_steps
    return job.pricing_steps + len(job.layers) + passes * len(job.tokens) + tuning
