"""A run as one object: what is pruned, from which tokens, by which settings; made and checked once."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor, nn

import armorfact
from armorfact_hf.checkpoint.fingerprint import (
    config_fingerprint,
    disk_fingerprint,
    model_fingerprint,
    tokens_fingerprint,
)
from armorfact_hf.free_memory import available
from armorfact_hf.model.causal_lm import CausalLM
from armorfact_hf.model.on_disk import InMemory, OnDisk, Weights
from armorfact_hf.model.rehearsal import (
    CANNOT_BE_TUNED,
    HAVE_NO_PRICES,
    refuse_routed,
    refuse_without_gradients,
    rehearse,
)
from armorfact_hf.model.structure import DenseLayer, Layer, Select, decoder_blocks
from armorfact_hf.pruning.checks import check_experts, check_model, check_states, checked_tokens
from armorfact_hf.pruning.config import PRICED, PruneConfig
from armorfact_hf.pruning.fitting import fitting_layers
from armorfact_hf.pruning.resume.manifest import flat_manifest
from armorfact_hf.pruning.schedule import Matching

PRICED_WINDOWS, PRICED_LENGTH = 4, 1024  # at most, spread over the calibration text, and tokens of each
SPILL_ABOVE = 1 / 4  # of the memory that is free: states that take more wait on disk


@dataclass(frozen=True, eq=False)
class Job:
    """What a run is about; `make_job` makes one, and everything that takes one may rely on its checks.

    Args:
        model: a dense causal language model.
        tokens: (windows, length) int64, the calibration tokens.
        config: what to prune and how.
        prefix, blocks: the name of the list that holds the decoder blocks, and the blocks in order.
        layers: what is pruned, in the order of the model, each with its wrappers' blocks.
        dense_layers: what stays dense, and why.
        weights: makes those of decoder blocks available while they are worked with.
        leader: for layers that a rehearsal called, the first one that is given the same input.
        states: where those of the calibration windows, and statistics of the last blocks, wait: "memory", "disk", or
            "auto", which is the disk for a model on disk, and for states that would take more than a quarter of the
            memory that is free.
        experts_at_once: of each experts module, so many have their second moments in memory at a time; None goes by
            memory (`armorfact_hf.pruning.memory.experts_at_once`).
    """

    model: CausalLM
    tokens: Tensor
    config: PruneConfig
    prefix: str
    blocks: tuple[nn.Module, ...]
    layers: tuple[Layer, ...]
    dense_layers: tuple[DenseLayer, ...]
    weights: Weights
    leader: Mapping[str, str]
    states: str = "auto"
    experts_at_once: int | None = None

    @property
    def window_bytes(self) -> int:
        """Of the states of one window."""
        width = self.model.get_input_embeddings().embedding_dim
        return self.tokens.shape[1] * width * self.layers[0].weight.element_size()

    @property
    def copies_of_states(self) -> int:
        """How many states of every window are kept at a time."""
        before = bool(self.tail) + (not self.follows_pruned)  # the last blocks, and the one at work
        return self.follows_pruned + self.follows_dense + before

    @property
    def states_bytes(self) -> int:
        """Of the states of all windows, in every copy."""
        return len(self.tokens) * self.window_bytes * self.copies_of_states

    @cached_property
    def spilled(self) -> bool:
        """Whether states wait on disk."""
        streamed = self.states == "auto" and isinstance(self.weights, OnDisk)
        return streamed or self.spills(available(self.weights.device))

    def spills(self, free: int) -> bool:
        """Whether states of a model in memory wait on disk where so many bytes are free beside it."""
        return self.states_bytes > SPILL_ABOVE * free if self.states == "auto" else self.states == "disk"

    @property
    def follows_pruned(self) -> bool:
        """Whether states of the pruned model flow from block to block."""
        return self.config.propagate == "pruned"

    @property
    def follows_dense(self) -> bool:
        """Whether states of the dense model do."""
        return self.config.propagate == "dense" or self.config.target == "output" or self.matching is not None

    @property
    def matching(self) -> Matching | None:
        """How decoder blocks are tuned; of a single window none can be kept aside, so that none is."""
        return self.config.matching if len(self.tokens) > 1 else None

    @cached_property
    def tuning_steps(self) -> dict[int, int]:
        """How many windows go forward and back while a decoder block is tuned by itself, for each that is."""
        pruned = {layer.decoder_block for layer in self.layers if layer.decoder_block is not None}
        if self.matching is None:
            return {}
        return {block: self.matching.of(block).steps(len(self.tokens)) for block in sorted(pruned)}

    @cached_property
    def tail(self) -> range:
        """The last decoder blocks, which are tuned together towards words: none, unless the last one is pruned."""
        count = len(self.blocks)
        ends = self.matching is not None and any(layer.decoder_block == count - 1 for layer in self.layers)
        return range(max(count - self.config.tail, 0), count) if ends else range(0)

    @property
    def tail_steps(self) -> int:
        """How many windows go forward and back while the last blocks are tuned together."""
        return self.matching.of_tail.steps(len(self.tokens)) if self.matching and self.tail else 0

    @property
    def pricing_steps(self) -> int:
        """How many times a window goes through a decoder block, forward or back, while prices are found."""
        return 2 * len(self.priced_tokens) * len(self.blocks)

    @property
    def uses_head(self) -> bool:
        """Whether the work needs the head: to be pruned, or to make words."""
        return bool(self.tail) or self.config.head or bool(self.priced)

    @property
    def priced(self) -> tuple[Layer, ...]:
        """The layers among which entries of wrappers are shared out by prices: the head is none of them.

        None are where experts are pruned, which have no prices and are nearly all of their model.
        """
        asked = self.config.method == "armorfact" and self.config.block == PRICED
        found = tuple(layer for layer in self.layers if layer.decoder_block is not None)
        return found if asked and len(found) > 1 and not any(layer.stack for layer in found) else ()

    @property
    def priced_tokens(self) -> Tensor:
        """(windows, length): the calibration tokens that prices are found from."""
        if not self.priced:
            return self.tokens[:0]
        return self.tokens[:: -(-len(self.tokens) // PRICED_WINDOWS), :PRICED_LENGTH]

    @cached_property
    def last_block(self) -> int:
        """The index of the last decoder block that has to be run."""
        final = len(self.blocks) - 1
        return max(final if layer.decoder_block is None else layer.decoder_block for layer in self.layers)

    @property
    def by_name(self) -> dict[str, Layer]:
        """The layers by name."""
        return {layer.name: layer for layer in self.layers}

    def modules_of(self, block: int | None) -> dict[str, nn.Module]:
        """The modules of `layers_of`, by name."""
        return {layer.name: layer.module for layer in self.layers_of(block)}

    def layers_of(self, block: int | None) -> list[Layer]:
        """The layers to prune in a decoder block; with None, the head if it is among them."""
        return [layer for layer in self.layers if layer.decoder_block == block]

    def let_go(self, names: Collection[str]) -> None:
        """Forget the weights of layers that pruned ones have replaced: of a model in memory nothing else holds them."""
        self.take([layer.weightless if layer.name in names else layer for layer in self.layers])

    def take(self, layers: Sequence[Layer]) -> None:
        """Go on with the same layers in another form: a job is held by many, and none may keep weights in memory."""
        object.__setattr__(self, "layers", tuple(layers))

    def leads(self, layer: Layer) -> bool:
        """Whether a layer has statistics of its own: others of its block are given the same input, and follow it."""
        return self._inside(layer.name) not in self._followers and not layer.follows_gate

    @cached_property
    def _followers(self) -> set[str]:
        return {self._inside(name) for name, leader in self.leader.items() if name != leader}

    def _inside(self, name: str) -> str:
        """The name of a layer in its decoder block: all blocks of a kind are alike, and one was called."""
        return name.removeprefix(f"{self.prefix}.").partition(".")[2]

    @cached_property
    def fingerprint(self) -> str:
        """The sha256 of the model, read once: ask for it, or for `manifest`, before the work changes the model."""
        return disk_fingerprint(self.weights) if isinstance(self.weights, OnDisk) else model_fingerprint(self.model)

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """All that the result depends on, one entry for each thing that two runs may differ in."""
        return flat_manifest(
            self.config.to_dict(),
            armorfact=armorfact.__version__,
            model=self.fingerprint,
            model_config=config_fingerprint(self.model),
            calibration=tokens_fingerprint(self.tokens),
            layers=_summary(self.layers),
        )


def _summary(layers: Sequence[Layer]) -> str:
    """Tells two choices of layers apart, in a few words: a model may have thousands."""
    names = "\n".join(layer.name for layer in layers)
    return f"{len(layers)} layers, sha256 {hashlib.sha256(names.encode()).hexdigest()}"


def make_job(
    model: nn.Module,
    calibration: Any,
    config: PruneConfig | None = None,
    select: Select | None = None,
    *,
    weights: Weights | None = None,
    states: str = "auto",
    experts_at_once: int | None = None,
) -> Job:
    """Check what `prune_` is given, and choose the layers.

    Args:
        model, calibration, config, select: as for `prune_`.
        weights: of the model, where they are not in memory.
        states, experts_at_once: see `Job`.

    Raises:
        ValueError: whatever can be found wrong with the arguments before the work starts.
    """
    config = PruneConfig() if config is None else config
    weights = InMemory(model) if weights is None else weights
    check_states(states)
    check_experts(experts_at_once)
    check_model(model, on_disk=isinstance(weights, OnDisk))
    tokens = checked_tokens(model, calibration)
    prefix, blocks = decoder_blocks(model)
    layers, dense = fitting_layers(model, config, select)
    with weights.rehearsing():
        inputs = rehearse(model, blocks, layers, tokens)
    if config.target == "output":
        refuse_routed(inputs, tokens, layers)
    job = Job(
        model,
        tokens,
        config,
        prefix,
        tuple(blocks),
        tuple(layers),
        tuple(dense),
        weights,
        inputs.leader,
        states,
        experts_at_once,
    )
    if job.matching is not None or job.priced:
        refused = CANNOT_BE_TUNED if job.matching is not None else HAVE_NO_PRICES
        with weights.rehearsing():
            refuse_without_gradients(model, blocks, layers, tokens, refused, through_head=bool(job.tail))
    return job
