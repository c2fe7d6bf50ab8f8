r"""What pruning each layer costs the model, foretold before anything is pruned.

An error e_t at the output of a layer moves the words of the model by

.. math:: \mathrm{KL} \approx \tfrac12 \operatorname{mean}_t \bigl(g_t^\top e_t\bigr)^2

nats a token, where g_t is the gradient there of the log-likelihood of words that are drawn, at every position, from the
model's own probabilities: the Fisher information. The error taken is SparseGPT's, which costs a Cholesky factorization:
by it layers stand in the order that they have with wrappers (``python -m benchmarks.prices``).

A few short windows go forward and back through the dense model, with one decoder block in memory at a time: each is run
once more on the way back.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import armorfact
from armorfact_hf.model.moments import recorded_gradients, recorded_inputs
from armorfact_hf.model.on_disk import HEAD
from armorfact_hf.model.rehearsal import HAVE_NO_PRICES
from armorfact_hf.model.stream import BlockStream, starting_at_embedding
from armorfact_hf.model.structure import Layer
from armorfact_hf.model.token_divergence import drawn_gradient
from armorfact_hf.pruning.config import DEFAULT_SHRINKAGE
from armorfact_hf.pruning.job import Job
from armorfact_hf.pruning.layer import shrunk
from armorfact_hf.pruning.progress import Progress
from armorfact_hf.pruning.spilled import Hidden
from armorfact_hf.pruning.states import States
from armorfact_hf.pruning.tuning.aims import LOGITS_A_STEP


def prices(job: Job, progress: Progress, folder: Path | None) -> dict[str, float]:
    """What pruning each of `Job.priced` alone costs, in nats a token.

    Layers that are not called just once in a pass have none, nor have those whose gradients overflow.

    Args:
        job: its model is dense, and in evaluation mode. progress: is told of every window. folder: states wait in files
            there; None is in memory.

    Raises:
        ValueError: gradients do not reach the layers. NonFiniteActivations: a module computes NaN or infinite values.
    """
    seen = fisher_samples(job, progress, folder)
    found = {one.layer.name: one.divergence(one.by_sparsegpt(job.config.pattern)) for one in seen}
    return {name: price for name, price in found.items() if math.isfinite(price)}


@dataclass(frozen=True)
class FisherSample:
    """What the windows show of one layer.

    Args:
        layer: its weight W is in memory as long as this is at work. inputs: (tokens, d_in). gradients: of the
            log-likelihood at the outputs, (tokens, d_out).
    """

    layer: Layer
    inputs: Tensor
    gradients: Tensor

    @property
    def weight(self) -> Tensor:
        """W, float32."""
        return self.layer.weight.contiguous().float()

    @property
    def gram(self) -> Tensor:
        """X X' with its diagonal added once more, as the solver is given it by default; float32."""
        x = self.inputs.float()
        return shrunk(x.T @ x, DEFAULT_SHRINKAGE)

    def by_sparsegpt(self, pattern: str) -> Tensor:
        """W pruned by SparseGPT."""
        return armorfact.sparsegpt(self.weight, self.gram, pattern=pattern)

    def divergence(self, pruned: Tensor) -> float:
        """Nats a token that the layer costs with this weight, foretold."""
        error = self.inputs.float() @ (self.weight - pruned).T
        return float((self.gradients.float() * error).sum(1).double().square().mean()) / 2


def fisher_samples(job: Job, progress: Progress, folder: Path | None) -> Iterator[FisherSample]:
    """What the windows show of each layer, see `prices`; from the last decoder block to the first."""
    with starting_at_embedding(job.model):
        passes = _Passes.forward(job, progress, folder)
        for block in reversed(range(len(job.blocks))):
            layers = {layer.name: layer for layer in job.priced if layer.decoder_block == block}
            with job.weights.held(block):
                seen = passes.back(block, layers, progress)
                yield from (FisherSample(layers[name], x, g) for name, (x, g) in seen.items())


@dataclass(frozen=True)
class _Passes:
    """Windows on their way through the dense model.

    Args:
        stream: runs its blocks. windows: (1, length) tokens each.
        given: by block, the states before it.
        gradients: by window, that of the log-likelihood at the states behind the block that is next on the way back.
    """

    stream: BlockStream
    windows: tuple[Tensor, ...]
    given: list[Hidden]
    gradients: list[Tensor]

    @classmethod
    def forward(cls, job: Job, progress: Progress, folder: Path | None) -> _Passes:
        """All the way to the words, and back behind the last block."""
        stream, windows = BlockStream(job.model, job.blocks), job.priced_tokens.split(1)
        states = States.before_the_first(stream, job.prefix, windows, folder)
        given = []
        for block in range(len(job.blocks)):
            given.append(states.hidden.copy())
            with job.weights.held(block):
                for window in range(len(windows)):
                    progress.tell(1, f"prices of layers: decoder block {block + 1}, forward")
                    states.advance(block, window)
        with job.weights.held(HEAD):
            behind = [_behind_the_last(stream, tokens, states.hidden[k], k) for k, tokens in enumerate(windows)]
        return cls(stream, windows, given, behind)

    def back(self, block: int, layers: Mapping[str, Layer], progress: Progress) -> dict[str, tuple[Tensor, Tensor]]:
        """Through one block; what its layers were given, and the gradients at what they returned, of all windows."""
        seen: dict[str, list[tuple[Tensor, Tensor]]] = {}
        for window in range(len(self.windows)):
            progress.tell(1, f"prices of layers: decoder block {block + 1}, back")
            for name, one in self._back(block, window, layers).items():
                seen.setdefault(name, []).append(one)
        whole = {name: parts for name, parts in seen.items() if len(parts) == len(self.windows)}
        return {name: (_joined(x for x, _ in parts), _joined(g for _, g in parts)) for name, parts in whole.items()}

    def _back(self, block: int, window: int, layers: Mapping[str, Layer]) -> dict[str, tuple[Tensor, Tensor]]:
        modules, hidden = {name: layer.module for name, layer in layers.items()}, self.given[block][window]
        leaf = None if hidden is None else hidden.detach().requires_grad_()
        with recorded_inputs(modules) as inputs, recorded_gradients(modules) as gradients:
            output = self.stream.run(block, self.windows[window], leaf, gradients=True)
            if not output.requires_grad:
                raise ValueError(HAVE_NO_PRICES)
            output.backward(self.gradients[window])
        if leaf is not None and leaf.grad is not None:
            self.gradients[window] = leaf.grad
        called = {name: calls[0].detach() for name, calls in inputs.calls.items() if len(calls) == 1}
        return {name: (x, gradients[name]) for name, x in called.items() if name in gradients}


def _joined(parts: Iterator[Tensor]) -> Tensor:
    return torch.cat([part.flatten(0, -2) for part in parts])


def _behind_the_last(stream: BlockStream, tokens: Tensor, hidden: Tensor | None, seed: int) -> Tensor:
    """The gradient of the log-likelihood at the states behind the last block, of words drawn from a seed."""
    model: Any = stream.model
    assert hidden is not None  # every window was run
    leaf = hidden.detach().requires_grad_()
    given = stream.head_input(model.get_output_embeddings(), tokens, leaf, gradients=True)
    logits = given.shape[1] * model.get_input_embeddings().num_embeddings
    gradient = drawn_gradient(stream, tokens, given.detach(), seed, every=-(-logits // LOGITS_A_STEP))
    return torch.autograd.grad(given, leaf, gradient)[0]
