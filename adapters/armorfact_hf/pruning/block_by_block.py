"""The sequential loop: gather a decoder block's statistics, prune its layers, and run what comes out of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import cast

import torch
from torch import Tensor

from armorfact_hf.model.moments import Inputs, Statistics
from armorfact_hf.model.stream import BlockStream, frozen
from armorfact_hf.model.structure import Layer
from armorfact_hf.model.words import Speaker, WordsApart
from armorfact_hf.observer import Observer
from armorfact_hf.pruning.aims import Aim, StateAim, WordAim
from armorfact_hf.pruning.job import Job
from armorfact_hf.pruning.journal import Finished, Journal, Pruned
from armorfact_hf.pruning.layer import LayerReport, with_tuned_loss
from armorfact_hf.pruning.matching import BlockReport, match_block_
from armorfact_hf.pruning.progress import Clock, Progress
from armorfact_hf.pruning.side_by_side import prune_layers
from armorfact_hf.pruning.states import States


@dataclass(frozen=True)
class BlockByBlock:
    """The loop over the decoder blocks. Only one block's statistics are in memory at a time.

    Between two blocks, ``pruned`` and ``dense`` hold the states of every window, each where the settings follow that
    model: statistics are taken from the pruned one's if there are any, and paired with the dense one's if there are
    both. Once a block's layers are factorized, ``pruned`` still stands before the block and ``dense`` behind it.

    Args:
        job: what is pruned; its model is in evaluation mode, and its layers are replaced.
        journal: where finished blocks are kept, or None.
        pruned, dense: the states of the model being pruned and of the dense one, or None. They move on.
        progress, clock: how far the run is. They move on.
        blocks: how each decoder block was tuned. It grows.
    """

    job: Job
    journal: Journal | None
    pruned: States | None
    dense: States | None
    progress: Progress
    clock: Clock
    blocks: list[BlockReport] = field(default_factory=list)

    @classmethod
    def of(cls, job: Job, journal: Journal | None, observer: Observer) -> BlockByBlock:
        """The loop of a job, before its first block."""
        stream, windows = BlockStream(job.model, job.blocks), job.tokens.split(1)
        pruned, dense = (
            States.before_the_first(stream, job.prefix, windows) if followed else None
            for followed in (job.follows_pruned, job.follows_dense)
        )
        return cls(job, journal, pruned, dense, Progress(observer, _units(job)), Clock())

    def reports(self) -> Iterator[LayerReport]:
        """Prune every block, then the head; the reports of their layers."""
        for index in range(self.job.last_block + 1):
            yield from self._prune_block(index, self.job.layers_of(index))
        yield from self._prune_head(self.job.layers_of(None))
        self.progress.tell(0, "done")

    def _prune_block(self, index: int, layers: list[Layer]) -> Iterator[LayerReport]:
        key = f"block-{index:04}"
        pruned = self._restored(key) if layers else []
        if pruned is None:
            given = self._given()
            statistics = self._inside_block(index, layers)
            finished = self._matched(index, given, self._finish(layers, statistics), statistics)
            pruned = self._kept(key, *finished)
        else:
            self._pass_by(index, layers)
        yield from self._replace(pruned)
        if self.pruned is not None and (index < self.job.last_block or self.job.config.head):
            for window in range(len(self.job.tokens)):
                self._tell_window(index, window)
                self.pruned.advance(index, window)

    def _prune_head(self, layers: list[Layer]) -> Iterator[LayerReport]:
        for head in layers:
            pruned = self._restored("head")
            if pruned is None:
                pruned = self._kept("head", self._finish(layers, self._at_head(head)))
            yield from self._replace(pruned)

    def _restored(self, key: str) -> Pruned | None:
        finished = None if self.journal is None else self.journal.read(key, self.job.model.device)
        if finished is None:
            return None
        self.clock.earlier += finished.seconds
        self._note(finished.matched)
        return finished.layers

    def _pass_by(self, index: int, layers: Sequence[Layer]) -> None:
        """Count a block without work as done, and move the dense model's states on through it while it is dense."""
        why = "is finished already" if layers else "has no layer to prune"
        steps = self.job.tuning_steps.get(index, 0)
        self.progress.tell(len(layers) + steps, f"decoder block {index + 1} {why}")
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

        return self._gathered(seen)

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
        layers = {report.name: layer for layer, report in pruned}
        with frozen(self.job.model):
            aim = self._aim(index, given, self.dense)
            tuned, matched = match_block_(self.job.model, layers, aim, self.job.matching, index)
        if not matched.kept:
            return pruned, matched
        dense = {layer.name: layer for layer in self.job.layers_of(index)}
        return [
            (tuned[x.name], with_tuned_loss(x, dense[x.name], tuned[x.name], statistics.of(x.name), self.job.config))
            for _, x in pruned
        ], matched

    def _aim(self, index: int, given: States, dense: States) -> Aim:
        """The states of the dense model behind a block, where ``dense`` stands; for the last blocks, its words."""
        stream, tokens = given.stream, given.windows

        def told(window: int) -> bool:
            self.progress.tell(int(torch.is_grad_enabled()), f"decoder block {index + 1}, tuned as a whole")
            return torch.is_grad_enabled()

        if not self.job.speaks(index):
            targets = cast(list[Tensor], dense.hidden)
            return StateAim(lambda k: stream.run(index, tokens[k], given.hidden[k], told(k)), targets)
        speaker = Speaker(self.job.model, stream)
        return WordAim(
            lambda k: stream.head_input(speaker.head, tokens[k], given.hidden[k], index, told(k)),
            self.job.tokens,
            lambda k: stream.head_input(speaker.head, tokens[k], dense.hidden[k], index + 1),
            WordsApart(speaker, speaker),
        )

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

    def _replace(self, pruned: Pruned) -> list[LayerReport]:
        """Put pruned layers into the model; their reports."""
        for layer, report in pruned:
            self.job.model.set_submodule(report.name, layer)
        return [report for _, report in pruned]

    def _tell_window(self, index: int, window: int) -> None:
        self.progress.tell(1, f"decoder block {index + 1} of {len(self.job.blocks)}, window {window + 1}")


def _units(job: Job) -> int:
    """The units of work of a run: a layer, and a window through a block."""
    passes = (2 * job.follows_pruned + job.follows_dense) * (job.last_block + 1)
    passes -= job.follows_pruned and not job.config.head  # nothing needs what the last block makes of it
    return len(job.layers) + passes * len(job.tokens) + sum(job.tuning_steps.values())
