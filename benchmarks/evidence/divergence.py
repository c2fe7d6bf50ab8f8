"""The KL divergence of a model with one layer changed from the dense model, on held-out windows.

Everything is computed in float32. In bfloat16 the least change of a layer moves the rounding of all that follows, which
alone costs 0.001 nats a token on the models measured: several times the effect of a well pruned layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from armorfact_hf.model.stream import BlockStream
from armorfact_hf.model.structure import Layer, decoder_blocks

POSITIONS_AT_ONCE = 128


class Divergence:
    """Measures layers one at a time; the states before the blocks of interest are computed once.

    Args:
        model: the dense model, in float32.
        windows: (windows, length) tokens.
        depths: the decoder blocks that hold layers to be changed.
        every: score each so-manieth position; the head dominates where the vocabulary is large.
    """

    def __init__(self, model: nn.Module, windows: Tensor, depths: Sequence[int], every: int = 1) -> None:
        self.windows, self.every = windows.split(1), every
        self.head = model.get_output_embeddings()
        self.stream = BlockStream(model, decoder_blocks(model)[1])
        self.before: list[dict[int, Tensor | None]] = [{} for _ in self.windows]
        self.dense = []
        for index in range(len(self.windows)):
            final = self._final(index, 0, None, depths)
            self.dense.append(torch.cat([part.log_softmax(-1) for part in self._logits(index, final)]))

    @torch.no_grad()
    def of(self, layer: Layer, weight: Tensor) -> list[float]:
        """The mean KL divergence over the scored positions of each window, in nats, with ``weight`` in the layer."""
        with replaced_weight(layer, weight):
            return [self._window(index, layer.decoder_block) for index in range(len(self.windows))]

    def _window(self, index: int, depth: int) -> float:
        final = self._final(index, depth, self.before[index][depth])
        total, start = 0.0, 0
        for logits in self._logits(index, final):
            dense = self.dense[index][start : start + len(logits)]
            change = logits.log_softmax(-1) - dense
            # sum p (exp d - 1 - d) is sum q - sum p + KL: no term is negative, so that small divergences do not drown.
            total += float((dense.exp() * (change.expm1() - change)).sum(dtype=torch.float64))
            start += len(logits)
        return total / start

    def _final(self, index: int, first: int, hidden: Tensor | None, depths: Sequence[int] = ()) -> Tensor:
        """What the head is given when the blocks from ``first`` on run; states before ``depths`` are kept."""
        tokens = self.windows[index]
        for depth in range(first, len(self.stream.blocks)):
            if depth in depths:
                self.before[index][depth] = hidden
            hidden = self.stream.run(depth, tokens, hidden)
        return self.stream.head_input(self.head, tokens, hidden)

    @torch.no_grad()
    def _logits(self, index: int, final: Tensor) -> Iterator[Tensor]:
        given = final[:, :: self.every]
        for part in given.split(POSITIONS_AT_ONCE, dim=1):
            yield self.stream.logits(self.head, self.windows[index][:, : part.shape[1]], part)[0].float()


@contextmanager
def replaced_weight(layer: Layer, weight: Tensor) -> Iterator[None]:
    """The layer's weight is another one inside the context."""
    kept = layer.weight.clone()
    layer.weight.copy_(weight)
    try:
        yield
    finally:
        layer.weight.copy_(kept)
