"""What pruning will do and cost, before it is done: bytes, wrapper overhead, memory, and time from a measured layer."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from armorfact import Pattern
from armorfact_hf.layers.linear import FactorizedLinear
from armorfact_hf.model.moments import Statistics, recorded_inputs
from armorfact_hf.model.stream import BlockStream
from armorfact_hf.model.structure import DenseLayer, Layer, decoder_blocks
from armorfact_hf.pruning.config import PruneConfig
from armorfact_hf.pruning.fitting import fitting_block, fitting_layers
from armorfact_hf.pruning.layer import prune_layer
from armorfact_hf.pruning.prune import checked_tokens, refuse_pruned
from armorfact_hf.pruning.side_by_side import layer_flops

SOLVER_COPIES = 6.5  # a generous estimate of one factorization's peak, in float32 copies of W and H


@dataclass(frozen=True)
class PlannedLayer:
    """A layer, its wrappers' blocks (None without wrappers), and its bytes before and after."""

    name: str
    shape: tuple[int, int]
    block: tuple[int, int] | None
    dense_bytes: int
    bytes: int
    wrapper_bytes: int


@dataclass(frozen=True)
class Plan:
    """What `prune_` will do with a model.

    Args:
        layers, dense_layers: what is pruned, and what stays dense and why.
        parameters: of the whole model.
        model_bytes: of the whole model, before.
        peak_bytes: an estimate of the memory that pruning takes at most, the model included.
        seconds: an estimate from running the first decoder block and pruning one layer, or None.
    """

    layers: tuple[PlannedLayer, ...]
    dense_layers: tuple[DenseLayer, ...]
    parameters: int
    model_bytes: int
    peak_bytes: int
    seconds: float | None

    @property
    def dense_bytes(self) -> int:
        """Bytes of the chosen layers before."""
        return sum(layer.dense_bytes for layer in self.layers)

    @property
    def bytes(self) -> int:
        """Bytes of the chosen layers after."""
        return sum(layer.bytes for layer in self.layers)

    @property
    def wrapper_overhead(self) -> float:
        """Bytes of the wrappers over bytes of the dense layers."""
        return sum(layer.wrapper_bytes for layer in self.layers) / self.dense_bytes

    def to_dict(self) -> dict[str, Any]:
        """The totals, as plain JSON types."""
        return {
            "dense_bytes": self.dense_bytes,
            "bytes": self.bytes,
            "wrapper_overhead": self.wrapper_overhead,
        }


def make_plan(
    model: nn.Module, calibration: Any, config: PruneConfig, *, measure: bool = True, select: Any = None
) -> Plan:
    """Plan the pruning of a model; nothing of it is changed.

    Args:
        model, calibration, config, select: as for `prune_`.
        measure: estimate the time, by running one window through the first decoder block and pruning one of its layers.

    Raises:
        ValueError: what `prune_` would raise for these arguments.
    """
    refuse_pruned(model)
    tokens = checked_tokens(model, calibration)
    layers, dense = fitting_layers(model, config, select)
    planned = tuple(_planned(layer, config) for layer in layers)
    model_bytes = sum(parameter.nbytes for parameter in model.parameters())
    return Plan(
        layers=planned,
        dense_layers=tuple(dense),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        model_bytes=model_bytes,
        peak_bytes=_peak_bytes(model, model_bytes, tokens, layers, config),
        seconds=_estimated_seconds(model, tokens, layers, config) if measure else None,
    )


def _planned(layer: Layer, config: PruneConfig) -> PlannedLayer:
    block, _ = fitting_block(layer.shape, config)
    if config.method != "armorfact":
        block = None
    stand_in = FactorizedLinear(
        *layer.shape, Pattern.parse(config.pattern), block, dtype=layer.weight.dtype, device="meta"
    )
    wrappers = 0 if block is None else stand_in.left.nbytes + stand_in.right.nbytes
    return PlannedLayer(layer.name, layer.shape, block, layer.weight.nbytes, stand_in.nbytes, wrappers)


def _peak_bytes(model: nn.Module, model_bytes: int, tokens: Tensor, layers: list[Layer], config: PruneConfig) -> int:
    """Weights, hidden states, the second moments of the largest block, and the work space of the largest layer."""
    width = model.get_input_embeddings().embedding_dim
    copies = 2 if config.target == "output" else 1
    states = tokens.numel() * width * layers[0].weight.element_size() * copies
    by_block: dict[int | None, int] = {}
    for layer in layers:
        d_in = layer.shape[1]
        square = d_in * d_in if config.needs_correlations else d_in
        by_block[layer.decoder_block] = by_block.get(layer.decoder_block, 0) + 8 * square * copies
    sizes = sorted(4 * (d_out * d_in + d_in * d_in) for d_out, d_in in (layer.shape for layer in layers))
    at_once = torch.get_num_threads() if layers[0].weight.device.type == "cpu" else 1
    return int(model_bytes + states + max(by_block.values()) + SOLVER_COPIES * sum(sizes[-at_once:]))


def _estimated_seconds(model: nn.Module, tokens: Tensor, layers: list[Layer], config: PruneConfig) -> float:
    """Time one window and one layer of the first block that is pruned, and scale by the work."""
    blocks = decoder_blocks(model)[1]
    stream, window = BlockStream(model.eval(), blocks), tokens[:1]
    first = len(blocks) - 1 if layers[0].decoder_block is None else layers[0].decoder_block
    here = [layer for layer in layers if layer.decoder_block == first]
    hidden = None
    for index in range(first):
        hidden = stream.run(index, window, hidden)
    stream.run(first, window, hidden)  # warms caches and lazily built parts
    plain = _seconds(lambda: stream.run(first, window, hidden))
    statistics = Statistics(config.needs_correlations)

    def gather() -> None:
        with recorded_inputs({layer.name: layer.module for layer in here}) as inputs:
            stream.run(first, window, hidden)
        statistics.add(inputs)

    gathering = _seconds(gather)
    reached = [layer for layer in here if layer.name in statistics.leader]
    solving = _seconds_a_flop(reached[0], statistics, config) * sum(map(layer_flops, layers)) if reached else 0.0
    passes = (config.propagate == "pruned") + (config.target == "output")
    last = max(first if layer.decoder_block is None else layer.decoder_block for layer in layers)
    return len(tokens) * (last + 1) * (gathering + passes * plain) + solving


def _seconds_a_flop(layer: Layer, statistics: Statistics, config: PruneConfig) -> float:
    moments = replace(statistics.of(layer.name), cross=None)
    prune_layer(layer, moments, replace(config, sweeps=min(config.sweeps, 1)))  # compiles, and warms caches
    return _seconds(lambda: prune_layer(layer, moments, config)) / layer_flops(layer)


def _seconds(act: Callable[[], object]) -> float:
    start = time.perf_counter()
    act()
    return time.perf_counter() - start
