"""The sequential loop: gather a decoder block's statistics, prune its layers, and run what comes out of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import cast

import torch
from torch import Tensor

from armorfact_hf.model.experts import put_layers_
from armorfact_hf.model.moments import Inputs, Moments, Statistics
from armorfact_hf.model.stream import BlockStream, frozen
from armorfact_hf.model.structure import Layer
from armorfact_hf.observer import Observer
from armorfact_hf.pruning.aims import Aim, StateAim
from armorfact_hf.pruning.experts import pool_
from armorfact_hf.pruning.job import Job
from armorfact_hf.pruning.journal import Finished, Journal, Pruned
from armorfact_hf.pruning.layer import LayerReport, with_tuned_loss
from armorfact_hf.pruning.matching import BlockReport, match_block_
from armorfact_hf.pruning.progress import Clock, Progress
from armorfact_hf.pruning.schedule import Matching
from armorfact_hf.pruning.side_by_side import prune_layers
from armorfact_hf.pruning.states import States
from armorfact_hf.pruning.tail import Tail, words_of


@dataclass(frozen=True)
class BlockByBlock:
    """The loop over the decoder blocks. Only one block's statistics are in memory at a time.

    Between two blocks, ``pruned`` and ``dense`` hold the states of every window, each where the settings follow that
    model: statistics are taken from the pruned one's if there are any, and paired with the dense one's if there are
    both. Once a block's layers are factorized, ``pruned`` still stands before the block and ``dense`` behind it. The
    last blocks wait in ``tail`` to be tuned once more, together.

    Args:
        job: what is pruned; its model is in evaluation mode, and its layers are replaced.
        journal: where finished blocks are kept, or None.
        pruned, dense: the states of the model being pruned and of the dense one, or None. They move on.
        progress, clock: how far the run is. They move on.
        blocks: how each decoder block was tuned. It grows.
        tail: see there.
    """

    job: Job
    journal: Journal | None
    pruned: States | None
    dense: States | None
    progress: Progress
    clock: Clock
    blocks: list[BlockReport] = field(default_factory=list)
    tail: Tail = field(default_factory=Tail)

    @classmethod
    def of(cls, job: Job, journal: Journal | None, observer: Observer) -> BlockByBlock:
        """The loop of a job, before its first block."""
        stream, windows = BlockStream(job.model, job.blocks), job.tokens.split(1)
        pruned, dense = (
            States.before_the_first(stream, job.prefix, windows) if followed else None
            for followed in (job.follows_pruned, job.follows_dense)
        )
        return cls(job, journal, pruned, dense, Progress(observer, _units(job)), Clock())

    def reports(self) -> tuple[LayerReport, ...]:
        """Prune every block, tune the last ones once more, and prune the head; the reports of their layers."""
        found: dict[str, LayerReport] = {}
        for index in range(self.job.last_block + 1):
            found |= self._prune_block(index, self.job.layers_of(index))
        found |= self._tune_tail()
        found |= self._prune_head(self.job.layers_of(None))
        self.progress.tell(0, "done")
        return tuple(found.values())

    def _prune_block(self, index: int, layers: list[Layer]) -> dict[str, LayerReport]:
        key, given = f"block-{index:04}", self._given()
        if index == self.job.tail.start and self.job.tail:
            self.tail.given, self.tail.finished = given, self._finished("tail")
        pruned = self._restored(key) if layers else []
        waits = index in self.job.tail and not self.tail.finished
        if pruned is not None:
            self._tell_finished(index, layers)
        if pruned is None or waits:
            statistics = self._inside_block(index, layers)
            if pruned is None:
                finished = self._matched(index, given, self._finish(layers, statistics), statistics)
                pruned = self._kept(key, *finished)
            if waits:
                self.tail.add(pruned, statistics)
        else:
            self._pass_by(index)
        reports = self._replace(pruned)
        if self.pruned is not None and (index < self.job.last_block or self.job.config.head):
            for window in range(len(self.job.tokens)):
                self._tell_window(index, window)
                self.pruned.advance(index, window)
        return reports

    def _tune_tail(self) -> dict[str, LayerReport]:
        """Tune the last blocks together towards the dense model's words; the reports of their layers."""
        if not self.job.tail:
            return {}
        if self.tail.finished is None:
            finished = self._matched_tail()
            pruned = self._kept("tail", *finished)
        else:
            self.progress.tell(self.job.tail_steps, "the last blocks are tuned already")
            pruned = self._counted(self.tail.finished)
        reports = self._replace(pruned)
        if self.pruned is not None and self.job.config.head:
            self.tail.follow_(self.job, self.pruned)
        return reports

    def _prune_head(self, layers: list[Layer]) -> dict[str, LayerReport]:
        reports: dict[str, LayerReport] = {}
        for head in layers:
            pruned = self._restored("head")
            if pruned is None:
                pruned = self._kept("head", self._finish(layers, self._at_head(head)))
            reports |= self._replace(pruned)
        return reports

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

    def _pass_by(self, index: int) -> None:
        """Move the dense model's states on through a block while it is dense."""
        for window in range(len(self.job.tokens)):
            if self.pruned is not None:
                self._tell_window(index, window)
            if self.dense is not None:
                self._tell_window(index, window)
                self.dense.advance(index, window)

    def _inside_block(self, index: int, layers: Sequence[Layer]) -> Statistics:
        """The moments of the inputs of a block's layers; the dense model's states move on to the next block."""
        modules = {layer.name: layer.module for layer in layers}

        def seen(states: States, window: int) -> Inputs:
            self._tell_window(index, window)
            return states.inputs(index, window, modules, advance=states is self.dense)

        statistics = self._gathered(seen)
        pool_(statistics, layers)
        return statistics

    def _at_head(self, head: Layer) -> Statistics:
        return self._gathered(lambda states, window: states.head_input(head.name, head.module, window))

    def _gathered(self, seen: Callable[[States, int], Inputs]) -> Statistics:
        """The moments over all windows of what is seen in each: first of what statistics are taken from."""
        statistics = Statistics(self.job.config.needs_correlations)
        for window in range(len(self.job.tokens)):
            inputs = [seen(states, window) for states in self._followed]
            statistics.add(*(inputs if self.job.config.target == "output" else inputs[:1]))
        return statistics

    @property
    def _followed(self) -> list[States]:
        """What statistics are taken from first."""
        return [states for states in (self.pruned, self.dense) if states is not None]

    def _given(self) -> States:
        """The states that the next block is given, kept where those of the dense model are about to move on."""
        first = self._followed[0]
        return replace(first, hidden=list(first.hidden))

    def _matched(
        self, index: int, given: States, pruned: Pruned, statistics: Statistics
    ) -> tuple[Pruned, BlockReport | None]:
        """The layers of a block, tuned together towards the states of the dense model behind it."""
        if self.job.matching is None or self.dense is None or not pruned:
            return pruned, None
        self._replace(pruned)
        stream, tokens, targets = given.stream, given.windows, cast(list[Tensor], self.dense.hidden)

        def run(window: int) -> Tensor:
            return stream.run(index, tokens[window], given.hidden[window], self._told(f"decoder block {index + 1}"))

        matching, moments = self.job.matching.of(index), {x.name: statistics.of(x.name) for _, x in pruned}
        return self._tuned(pruned, moments, StateAim(run, targets), matching, index)

    def _matched_tail(self) -> tuple[Pruned, BlockReport | None]:
        """The layers of the last blocks, tuned together towards the words of the dense model."""
        if self.job.matching is None or self.dense is None:
            return self.tail.pruned, None
        first, last = self.job.tail[0], self.job.tail[-1]
        aim = words_of(self.job, self.tail, self.dense, lambda: self._told("the last decoder blocks"))
        pruned, matched = self._tuned(self.tail.pruned, self.tail.moments, aim, self.job.matching.of_tail, first)
        return pruned, replace(matched, through=last)

    def _told(self, what: str) -> bool:
        """Whether gradients are enabled: a window is a unit of work then."""
        self.progress.tell(int(torch.is_grad_enabled()), f"{what}, tuned as a whole")
        return torch.is_grad_enabled()

    def _tuned(
        self, pruned: Pruned, moments: Mapping[str, Moments], aim: Aim, matching: Matching, index: int
    ) -> tuple[Pruned, BlockReport]:
        """Layers that were tuned together, with their losses now, or as they were."""
        layers = {report.name: layer for layer, report in pruned}
        with frozen(self.job.model):
            tuned, matched = match_block_(self.job.model, layers, aim, matching, index)
        if not matched.kept:
            return pruned, matched
        dense = {layer.name: layer for layer in self.job.layers}
        return [
            (tuned[x.name], with_tuned_loss(x, dense[x.name], tuned[x.name], moments[x.name], self.job.config))
            for _, x in pruned
        ], matched

    def _finish(self, layers: Sequence[Layer], statistics: Statistics) -> Pruned:
        # A layer that no token reaches (of an expert, say) is left as it is.
        work = [(layer, statistics.of(layer.name)) for layer in layers if layer.name in statistics.leader]
        return prune_layers(work, self.job.config, lambda layer: self.progress.tell(1, layer.name))

    def _kept(self, key: str, pruned: Pruned, matched: BlockReport | None = None) -> Pruned:
        """The pruned layers, once they stand in the journal."""
        if self.journal is not None:
            self.journal.write(key, Finished(pruned, self.clock.lap(), matched))
        self._note(matched)
        return pruned

    def _note(self, matched: BlockReport | None) -> None:
        if matched is not None:
            self.blocks.append(matched)

    def _replace(self, pruned: Pruned) -> dict[str, LayerReport]:
        """Put pruned layers into the model; their reports by name."""
        put_layers_(self.job.model, {report.name: layer for layer, report in pruned})
        return {report.name: report for _, report in pruned}

    def _tell_window(self, index: int, window: int) -> None:
        self.progress.tell(1, f"decoder block {index + 1} of {len(self.job.blocks)}, window {window + 1}")


def _units(job: Job) -> int:
    """The units of work of a run: a layer, and a window through a block."""
    passes = (2 * job.follows_pruned + job.follows_dense) * (job.last_block + 1)
    passes -= job.follows_pruned and not job.config.head  # nothing needs what the last block makes of it
    return len(job.layers) + passes * len(job.tokens) + sum(job.tuning_steps.values()) + job.tail_steps
