"""What one model, the dense one or the one being pruned, makes of the calibration windows up to a decoder block."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from armorfact_hf.model.moments import Inputs, recorded_inputs
from armorfact_hf.model.nonfinite import NonFiniteActivations, first_nonfinite
from armorfact_hf.model.stream import BlockStream
from armorfact_hf.pruning.spilled import Hidden, nowhere


@dataclass(frozen=True)
class States:
    """The hidden states of every window between two decoder blocks.

    Args:
        stream: runs the blocks. prefix: the name of their list in the model.
        windows: (1, length) tokens each.
        hidden: by window, (1, length, width) what the block before returned; None before the first. It moves on. It
            is a list, or acts as one whose states are on disk.
    """

    stream: BlockStream
    prefix: str
    windows: tuple[Tensor, ...]
    hidden: Hidden

    @classmethod
    def before_the_first(
        cls, stream: BlockStream, prefix: str, windows: tuple[Tensor, ...], folder: Path | None = None
    ) -> States:
        """The states of a model of which nothing was run yet; they are kept in files of ``folder`` if there is one."""
        return cls(stream, prefix, windows, nowhere(len(windows), folder))

    def copy(self) -> States:
        """The same states, which stay where they are when these move on."""
        return replace(self, hidden=self.hidden.copy())

    def advance(self, block: int, window: int) -> None:
        """Move the states of a window on through a block."""
        self.hidden[window] = self._finite(block, window, Inputs())

    def inputs(self, block: int, window: int, layers: Mapping[str, nn.Module], advance: bool) -> Inputs:
        """What layers of a block are given for a window; its states move on if ``advance``."""
        with recorded_inputs(layers) as inputs:
            after = self._finite(block, window, inputs)
        if advance:
            self.hidden[window] = after
        return inputs

    def head_input(self, name: str, head: nn.Module, window: int) -> Inputs:
        """What the head is given for a window, once the last block was run."""
        inputs = Inputs()
        inputs.see(name, self.stream.head_input(head, self.windows[window], self.hidden[window]))
        return inputs

    def _finite(self, block: int, window: int, inputs: Inputs) -> Tensor:
        """What a block makes of the states of a window, once that and the inputs of its layers are finite."""
        tokens, hidden = self.windows[window], self.hidden[window]
        after = self.stream.run(block, tokens, hidden)
        if not all(torch.isfinite(x).all() for x in (after, *inputs.tensors.values())):
            name = f"{self.prefix}.{block}"
            module = self.stream.blocks[block]
            culprit = first_nonfinite(module, name, lambda: self.stream.run(block, tokens, hidden)) or name
            raise NonFiniteActivations(
                f"{culprit} is the first module to return NaN or infinite values, on calibration window {window}; "
                "load the model in bfloat16 or float32, or leave that window out"
            )
        return after
