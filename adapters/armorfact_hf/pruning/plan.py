"""What pruning will do and cost, before it is done: bytes, wrapper overhead, memory, and time from a measured layer."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from armorfact import Pattern
from armorfact_hf.layers.cuts import Share
from armorfact_hf.layers.format import LayerFormat
from armorfact_hf.model.experts import run_by_expert
from armorfact_hf.model.moments import Statistics
from armorfact_hf.model.stream import BlockStream, evaluating
from armorfact_hf.model.structure import DenseLayer, Layer, Select
from armorfact_hf.pruning.aims import LOGITS_A_STEP
from armorfact_hf.pruning.config import PruneConfig
from armorfact_hf.pruning.fitting import fitting_block
from armorfact_hf.pruning.job import Job, make_job
from armorfact_hf.pruning.layer import prune_layer
from armorfact_hf.pruning.side_by_side import layer_flops
from armorfact_hf.pruning.states import States

BACKWARD = 3.5  # what forward, backward and a step cost, in forward passes
SOLVER_COPIES = 6.5  # a generous estimate of one factorization's peak, in float32 copies of W and H


@dataclass(frozen=True)
class PlannedLayer:
    """A layer, its wrappers' blocks (None without wrappers), and its bytes before and after.

    Args:
        uncut_block: the blocks that it would have if no ranks were to share it.
        rank_bytes: the most that one of the ranks holds of it.
        in_block: whether it is in a decoder block: the output head is not.
    """

    name: str
    shape: tuple[int, int]
    block: tuple[int, int] | None
    dense_bytes: int
    bytes: int
    wrapper_bytes: int
    uncut_block: tuple[int, int] | None
    rank_bytes: int
    in_block: bool


@dataclass(frozen=True)
class Plan:
    """What `prune_` will do with a model.

    Args:
        layers, dense_layers: what is pruned, and what stays dense and why.
        tensor_parallel: how many ranks the layers are made for.
        parameters: of the whole model.
        weights: parameters in the matrices of the decoder blocks, those of stacked experts among them.
        model_bytes: of the whole model, before.
        peak_bytes: an estimate of the memory that pruning takes at most, the model included.
        seconds: an estimate from running the first decoder block and pruning one layer, or None.
    """

    layers: tuple[PlannedLayer, ...]
    dense_layers: tuple[DenseLayer, ...]
    tensor_parallel: int
    parameters: int
    weights: int
    model_bytes: int
    peak_bytes: int
    seconds: float | None

    @property
    def stays_dense(self) -> float:
        """The share of those weights that no chosen layer holds."""
        inside = sum(layer.shape[0] * layer.shape[1] for layer in self.layers if layer.in_block)
        return 1 - inside / self.weights if self.weights else 0.0

    @property
    def dense_bytes(self) -> int:
        """Bytes of the chosen layers before."""
        return sum(layer.dense_bytes for layer in self.layers)

    @property
    def bytes(self) -> int:
        """Bytes of the chosen layers after."""
        return sum(layer.bytes for layer in self.layers)

    @property
    def rank_bytes(self) -> int:
        """Bytes of the chosen layers on one rank, at most: each holds the wrappers on one side of a cut as a whole."""
        return sum(layer.rank_bytes for layer in self.layers)

    @property
    def recut(self) -> dict[tuple[tuple[int, int], tuple[int, int]], list[str]]:
        """The layers whose blocks are others for the sake of the ranks, by their blocks without and with them."""
        found: dict[tuple[tuple[int, int], tuple[int, int]], list[str]] = {}
        for layer in self.layers:
            if layer.uncut_block is not None and layer.block is not None and layer.uncut_block != layer.block:
                found.setdefault((layer.uncut_block, layer.block), []).append(layer.name)
        return found

    @property
    def wrapper_overhead(self) -> float:
        """Bytes of the wrappers over bytes of the dense layers."""
        return sum(layer.wrapper_bytes for layer in self.layers) / self.dense_bytes


def make_plan(
    model: nn.Module,
    calibration: Any,
    config: PruneConfig | None = None,
    *,
    measure: bool = True,
    select: Select | None = None,
) -> Plan:
    """Plan the pruning of a model; nothing of it is changed.

    Args:
        model, calibration, config, select: as for `prune_`.
        measure: see `plan_job`.

    Raises:
        ValueError: what `prune_` would raise for these arguments before it starts to work.
    """
    return plan_job(make_job(model, calibration, config, select), measure=measure)


def plan_job(job: Job, *, measure: bool = True) -> Plan:
    """What `prune_job_` will do and cost.

    Args:
        measure: estimate the time, by running one window through the first decoder block and pruning one of its layers.
    """
    model_bytes = sum(parameter.nbytes for parameter in job.model.parameters())
    return Plan(
        layers=tuple(_planned(layer, job.config) for layer in job.layers),
        dense_layers=job.dense_layers,
        tensor_parallel=job.config.tensor_parallel,
        parameters=sum(parameter.numel() for parameter in job.model.parameters()),
        weights=sum(weight.numel() for block in job.blocks for weight in block.parameters() if weight.ndim > 1),
        model_bytes=model_bytes,
        peak_bytes=_peak_bytes(job, model_bytes),
        seconds=_estimated_seconds(job) if measure else None,
    )


def _planned(layer: Layer, config: PruneConfig) -> PlannedLayer:
    wrapped, ranks, dtype = config.method == "armorfact", config.tensor_parallel, layer.weight.dtype
    stored = LayerFormat(layer.name, layer.shape, Pattern.parse(config.pattern), layer.block if wrapped else None)
    cuts = Share.of_rows(layer.shape, 0, ranks), Share.of_columns(layer.shape, 0, ranks)
    whole = stored.nbytes(dtype)
    return PlannedLayer(
        layer.name,
        layer.shape,
        stored.block,
        layer.weight.nbytes,
        whole,
        whole - replace(stored, block=None).nbytes(dtype),
        fitting_block(layer.shape, replace(config, tensor_parallel=1))[0] if wrapped else None,
        max(cut.of_format(stored).nbytes(dtype) for cut in cuts),
        layer.decoder_block is not None,
    )


def _peak_bytes(job: Job, model_bytes: int) -> int:
    """Weights, hidden states, second moments (of the largest block, or the last ones), and the largest work space."""
    width = job.model.get_input_embeddings().embedding_dim
    copies = job.follows_pruned + job.follows_dense
    states = job.tokens.numel() * width * job.layers[0].weight.element_size() * (copies + bool(job.tail))
    by_block: dict[int | None, int] = {}
    for layer in job.layers:
        d_in = layer.shape[1]
        square = d_in * d_in if job.config.needs_correlations else d_in
        by_block[layer.decoder_block] = by_block.get(layer.decoder_block, 0) + 8 * square * copies
    sizes = sorted(4 * (d_out * d_in + d_in * d_in) for d_out, d_in in (layer.shape for layer in job.layers))
    at_once = torch.get_num_threads() if job.layers[0].weight.device.type == "cpu" else 1
    solving = SOLVER_COPIES * sum(sizes[-at_once:])
    moments = max(max(by_block.values()), sum(by_block.get(block, 0) for block in job.tail))
    return int(model_bytes + states + moments + max(solving, _tuning_bytes(job)))


def _tuning_bytes(job: Job) -> int:
    """Factors in float32 with gradient, Adam's two moments and a copy to undo with; what one window leaves to go back.

    An estimate: every layer keeps its input and output in 16 bits, and as much again lies between the layers.
    """
    if job.matching is None:
        return 0
    by_block: dict[int | None, int] = {}
    for layer in job.layers:
        pattern, (d_out, d_in) = Pattern.parse(job.config.pattern), layer.shape
        (b_out, b_in) = layer.block or (0, 0)
        factors = d_out * d_in * pattern.keep // pattern.group + b_out * d_out + b_in * d_in
        dense = 2 * d_out * d_in  # W, formed anew for every step, and its gradient
        passing = 4 * job.tokens.shape[1] * (d_out + d_in)
        by_block[layer.decoder_block] = by_block.get(layer.decoder_block, 0) + 20 * factors + 4 * dense + passing
    return max(max(by_block.values()), sum(by_block.get(block, 0) for block in job.tail))


def _estimated_seconds(job: Job) -> float:
    """Time one window and one layer of the first block that is pruned, and scale by the work."""
    first = min(job.last_block if layer.decoder_block is None else layer.decoder_block for layer in job.layers)
    here = [layer for layer in job.layers if layer.decoder_block == first]
    statistics = Statistics(job.config.needs_correlations)
    with evaluating(job.model), run_by_expert(job.modules):
        states = States.before_the_first(BlockStream(job.model, job.blocks), job.prefix, job.tokens[:1].split(1))
        for index in range(first):
            states.advance(index, 0)
        states.inputs(first, 0, {}, advance=False)  # warms caches and lazily built parts
        plain = _seconds(lambda: states.inputs(first, 0, {}, advance=False))
        modules = {layer.name: layer.module for layer in here}
        gathering = _seconds(lambda: statistics.add(states.inputs(first, 0, modules, advance=False)))
    reached = [layer for layer in here if layer.name in statistics.leader]
    solving = _seconds_a_flop(reached[0], statistics, job.config) * _flops(job) if reached else 0.0
    passes = job.follows_pruned + job.follows_dense * job.follows_pruned
    flowing = len(job.tokens) * (job.last_block + 1) * (gathering + passes * plain)
    return flowing + solving + plain * _tuning_passes(job)


def _tuning_passes(job: Job) -> float:
    """What tuning costs, in passes of a window through a decoder block."""
    length, embedding = job.tokens.shape[1], job.model.get_input_embeddings()
    logits = min(length * embedding.num_embeddings, LOGITS_A_STEP)
    weights = max(sum(parameter.numel() for parameter in block.parameters()) for block in job.blocks)
    head = 4 * logits * embedding.embedding_dim / (length * weights)  # run twice, and back
    towards_words = job.tail_steps * (BACKWARD * len(job.tail) + head)
    return BACKWARD * sum(job.tuning_steps.values()) + towards_words


def _flops(job: Job) -> float:
    return sum(map(layer_flops, job.layers))


def _seconds_a_flop(layer: Layer, statistics: Statistics, config: PruneConfig) -> float:
    moments = replace(statistics.of(layer.name), cross=None)
    prune_layer(layer, moments, replace(config, sweeps=min(config.sweeps, 1)))  # compiles, and warms caches
    return _seconds(lambda: prune_layer(layer, moments, config)) / layer_flops(layer)


def _seconds(act: Callable[[], object]) -> float:
    start = time.perf_counter()
    act()
    return time.perf_counter() - start
