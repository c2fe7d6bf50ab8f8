"""The sequential loop: gather a decoder block's statistics, prune its layers, and run what comes out of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from armorfact_hf.model.moments import Inputs, Statistics, recorded_inputs
from armorfact_hf.model.nonfinite import NonFiniteActivations, first_nonfinite
from armorfact_hf.model.stream import BlockStream
from armorfact_hf.model.structure import Layer, decoder_blocks
from armorfact_hf.pruning.config import PruneConfig
from armorfact_hf.pruning.journal import Finished, Journal, Pruned
from armorfact_hf.pruning.layer import LayerReport
from armorfact_hf.pruning.side_by_side import prune_layers


@dataclass(frozen=True)
class Step:
    """What a progress callback is told: ``done`` of ``total`` units of work, and what comes next."""

    done: int
    total: int
    doing: str


@dataclass
class BlockByBlock:
    """The loop over the decoder blocks.

    Between two blocks, ``hidden`` holds the states of every window that statistics are taken from, and ``dense`` those
    of the dense model, where the target is its output. Only one block's statistics are in memory at a time.

    Args:
        model: in evaluation mode; its layers are replaced.
        windows: (1, length) tokens each.
        config: the settings.
        layers: what to prune, in the order of the model.
        journal: where finished blocks are kept, or None.
        progress: called after each unit of work, or None.
    """

    model: nn.Module
    windows: list[Tensor]
    config: PruneConfig
    layers: list[Layer]
    journal: Journal | None
    progress: Callable[[Step], object] | None
    done: int = 0

    def __post_init__(self) -> None:
        self.prefix, self.blocks = decoder_blocks(self.model)
        self.stream = BlockStream(self.model, self.blocks)
        self.hidden: list[Tensor | None] = [None] * len(self.windows)
        self.dense: list[Tensor | None] = [None] * len(self.windows)
        last = len(self.blocks) - 1
        self.earlier = 0.0  # seconds spent on what was finished already
        self.clock = time.perf_counter()
        self.last = max(last if x.decoder_block is None else x.decoder_block for x in self.layers)

    def reports(self) -> Iterator[LayerReport]:
        """Prune every block, then the head; the reports of their layers."""
        for index in range(self.last + 1):
            layers = [layer for layer in self.layers if layer.decoder_block == index]
            yield from self._prune_block(index, layers)
        for layer in self.layers:
            if layer.decoder_block is None:
                yield from self._replace(self._restored("head") or self._finish("head", [layer], self._at_head(layer)))
        self._tell(0, "done")

    def _prune_block(self, index: int, layers: list[Layer]) -> Iterator[LayerReport]:
        key = f"block-{index:04}"
        pruned = self._restored(key) if layers else []
        if pruned is None:
            pruned = self._finish(key, layers, self._inside_block(index, layers))
        else:
            self._tell(len(layers), f"decoder block {index + 1} is finished already")
            self._run_dense(index)
        yield from self._replace(pruned)
        if self.config.propagate == "pruned" and (index < self.last or self.config.head):
            for window in range(len(self.windows)):
                self.hidden[window] = self._states_after(index, window, self.hidden)

    def _restored(self, key: str) -> Pruned | None:
        finished = None if self.journal is None else self.journal.read(key, self.model.device)
        if finished is None:
            return None
        self.earlier += finished.seconds
        return finished.layers

    def _inside_block(self, index: int, layers: list[Layer]) -> Statistics:
        """The moments of the layers' inputs; what follows the dense model moves on to the next block."""
        modules = {layer.name: layer.module for layer in layers}
        statistics = Statistics(self.config.needs_correlations)
        for window in range(len(self.windows)):
            with recorded_inputs(modules) as inputs:
                states = self._states_after(index, window, self.hidden, inputs)
            dense = None
            if self.config.target == "output":
                with recorded_inputs(modules) as dense:
                    self.dense[window] = self._states_after(index, window, self.dense, dense)
            elif self.config.propagate == "dense":
                self.hidden[window] = states
            statistics.add(inputs, dense)
        return statistics

    def _run_dense(self, index: int) -> None:
        """Move on what follows the dense model, through a block that is still dense."""
        followers = {"pruned": self.dense if self.config.target == "output" else None, "dense": self.hidden}
        states = followers[self.config.propagate]
        for window in range(len(self.windows)):
            if states is None:
                self._tell(1, f"decoder block {index + 1} of {len(self.blocks)}")
            else:
                states[window] = self._states_after(index, window, states)

    def _states_after(
        self, index: int, window: int, states: list[Tensor | None], inputs: Inputs | None = None
    ) -> Tensor:
        """What block ``index`` makes of the states of a window, once that is finite."""
        tokens, hidden = self.windows[window], states[window]
        self._tell(1, f"decoder block {index + 1} of {len(self.blocks)}, window {window + 1}")
        after = self.stream.run(index, tokens, hidden)
        if not all(torch.isfinite(x).all() for x in (after, *(inputs.tensors.values() if inputs else ()))):
            block, name = self.blocks[index], f"{self.prefix}.{index}"
            culprit = first_nonfinite(block, name, lambda: self.stream.run(index, tokens, hidden)) or name
            raise NonFiniteActivations(
                f"{culprit} is the first module to return NaN or infinite values, on calibration window {window}; "
                "load the model in bfloat16 or float32, or leave that window out"
            )
        return after

    def _at_head(self, layer: Layer) -> Statistics:
        statistics = Statistics(self.config.needs_correlations)
        for window, hidden in enumerate(self.hidden):
            seen = Inputs()
            seen.see(layer.name, self.stream.head_input(layer.module, self.windows[window], hidden))
            dense = None
            if self.config.target == "output":
                dense = Inputs()
                dense.see(layer.name, self.stream.head_input(layer.module, self.windows[window], self.dense[window]))
            statistics.add(seen, dense)
        return statistics

    def _finish(self, key: str, layers: list[Layer], statistics: Statistics) -> Pruned:
        # A layer that no token reaches (of an expert, say) is left as it is.
        work = [(layer, statistics.of(layer.name)) for layer in layers if layer.name in statistics.leader]
        pruned = prune_layers(work, self.config, lambda layer: self._tell(1, layer.name))
        if self.journal is not None:
            now = time.perf_counter()
            self.journal.write(key, Finished(pruned, now - self.clock))
            self.clock = now
        return pruned

    def _replace(self, pruned: Pruned) -> Iterator[LayerReport]:
        for layer, report in pruned:
            self.model.set_submodule(report.name, layer)
            yield report

    def _tell(self, units: int, doing: str) -> None:
        """Say what comes next; it is counted as done when the next thing is said."""
        if self.progress is not None:
            follows_pruned = self.config.propagate == "pruned"
            passes = (1 + follows_pruned + (self.config.target == "output")) * (self.last + 1)
            passes -= follows_pruned and not self.config.head  # nothing needs what the last block makes of it
            total = len(self.layers) + passes * len(self.windows)
            self.progress(Step(min(self.done, total), total, doing))
        self.done += units
