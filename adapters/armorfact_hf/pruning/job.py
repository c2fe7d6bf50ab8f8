"""A run as one object: what is pruned, from which tokens, by which settings; made and checked once."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor, nn

import armorfact
from armorfact_hf.model.causal_lm import CausalLM
from armorfact_hf.model.rehearsal import refuse_routed, rehearse
from armorfact_hf.model.structure import DenseLayer, Layer, Select, decoder_blocks
from armorfact_hf.pruning.checks import check_model, checked_tokens
from armorfact_hf.pruning.config import PruneConfig
from armorfact_hf.pruning.fitting import fitting_layers
from armorfact_hf.pruning.journal import flat_manifest, model_fingerprint, tokens_fingerprint
from armorfact_hf.pruning.schedule import Matching


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
    """

    model: CausalLM
    tokens: Tensor
    config: PruneConfig
    prefix: str
    blocks: tuple[nn.Module, ...]
    layers: tuple[Layer, ...]
    dense_layers: tuple[DenseLayer, ...]

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
        """How many windows go forward and back while they are."""
        return self.matching.of_tail.steps(len(self.tokens)) if self.matching and self.tail else 0

    @cached_property
    def last_block(self) -> int:
        """The index of the last decoder block that has to be run."""
        final = len(self.blocks) - 1
        return max(final if layer.decoder_block is None else layer.decoder_block for layer in self.layers)

    @property
    def modules(self) -> dict[str, nn.Module]:
        """The layers' modules by name."""
        return {layer.name: layer.module for layer in self.layers}

    def layers_of(self, block: int | None) -> list[Layer]:
        """The layers to prune in a decoder block; with None, the head if it is among them."""
        return [layer for layer in self.layers if layer.decoder_block == block]

    @cached_property
    def fingerprint(self) -> str:
        """The sha256 of the model, read once: ask for it, or for `manifest`, before the work changes the model."""
        return model_fingerprint(self.model)

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """All that the result depends on, one entry for each thing that two runs may differ in."""
        return flat_manifest(
            self.config.to_dict(),
            armorfact=armorfact.__version__,
            model=self.fingerprint,
            calibration=tokens_fingerprint(self.tokens),
            layers=_summary(self.layers),
        )


def _summary(layers: Sequence[Layer]) -> str:
    """Tells two choices of layers apart, in a few words: a model may have thousands."""
    names = "\n".join(layer.name for layer in layers)
    return f"{len(layers)} layers, sha256 {hashlib.sha256(names.encode()).hexdigest()}"


def make_job(
    model: nn.Module, calibration: Any, config: PruneConfig | None = None, select: Select | None = None
) -> Job:
    """Check what `prune_` is given, and choose the layers.

    Args:
        model, calibration, config, select: as for `prune_`.

    Raises:
        ValueError: whatever can be found wrong with the arguments before the work starts.
    """
    config = PruneConfig() if config is None else config
    check_model(model)
    tokens = checked_tokens(model, calibration)
    prefix, blocks = decoder_blocks(model)
    layers, dense = fitting_layers(model, config, select)
    inputs = rehearse(model, blocks, layers, tokens)
    if config.target == "output":
        refuse_routed(inputs, tokens, layers)
    return Job(model, tokens, config, prefix, tuple(blocks), tuple(layers), tuple(dense))
