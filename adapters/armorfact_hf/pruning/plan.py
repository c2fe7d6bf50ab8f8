"""What pruning will do and cost, before it is done: bytes, wrapper overhead, memory, and time from a measured layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from armorfact import Pattern
from armorfact_hf.layers.cuts import Share
from armorfact_hf.layers.format import LayerFormat
from armorfact_hf.model.on_disk import OnDisk
from armorfact_hf.model.structure import DenseLayer, Layer, Select
from armorfact_hf.pruning.config import PruneConfig
from armorfact_hf.pruning.estimate import estimated_seconds
from armorfact_hf.pruning.fitting import fitting_block
from armorfact_hf.pruning.job import Job, make_job
from armorfact_hf.pruning.memory import (
    Memory,
    experts_at_once,
    memory_of,
    model_bytes,
    priced_bytes,
    unrounded_bytes,
    waiting_bytes,
)
from armorfact_hf.pruning.workers.choice import Choice, count_here
from armorfact_hf.pruning.workers.cluster_memory import ClusterMemory, cluster_memory


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
        layers, dense_layers: what is pruned, and what stays dense and why. Where prices are going to choose blocks
            (`armorfact_hf.pruning.budget`), these are those of "auto", and what they add in all is the most.
        tensor_parallel: how many ranks the layers are made for.
        parameters: of the whole model.
        weights: parameters in the matrices of the decoder blocks, those of stacked experts among them.
        model_bytes: of the whole model, before.
        memory: an estimate of what pruning takes at most. streamed: whether decoder blocks are read one at a time.
        waiting_bytes: of what waits on disk between blocks, 0 where that is in memory.
        disk_bytes: what is on disk at most at a time: the layers in the journal, and beside them what waits and a block
            that is at work, which have gone when the finished folder is written, or that.
        seconds: an estimate from running the first decoder block and pruning one layer, or None.
        experts_at_once: of each experts module, so many have their statistics in memory at a time; None is all.
        cluster: where memory is taken when others do the work; ``memory`` is that of this process then.
    """

    layers: tuple[PlannedLayer, ...]
    dense_layers: tuple[DenseLayer, ...]
    tensor_parallel: int
    parameters: int
    weights: int
    model_bytes: int
    memory: Memory
    streamed: bool
    waiting_bytes: int
    disk_bytes: int
    seconds: float | None
    experts_at_once: int | None = None
    cluster: ClusterMemory | None = None

    @property
    def peak_bytes(self) -> int:
        """Of memory, at most."""
        return self.memory.peak if self.cluster is None else self.cluster.peak

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


def plan_job(job: Job, *, measure: bool = True, workers: Choice = None) -> Plan:
    """What `prune_job_` will do and cost.

    Args:
        measure: estimate the time, see `timed`. workers: see `prune_`; the time is that of one process anyhow.
    """
    cluster = None if workers is None else cluster_memory(job, count_here(workers, job.weights.device))
    experts = experts_at_once(job) if cluster is None else None
    layers = planned_layers(job.layers, job.config)
    waiting = waiting_bytes(job, experts) if cluster is None else priced_bytes(job) * job.spilled
    found = Plan(
        layers=layers,
        dense_layers=job.dense_layers,
        tensor_parallel=job.config.tensor_parallel,
        parameters=sum(parameter.numel() for parameter in job.model.parameters()),
        weights=sum(weight.numel() for block in job.blocks for weight in block.parameters() if weight.ndim > 1),
        model_bytes=model_bytes(job),
        memory=memory_of(job, experts=experts) if cluster is None else cluster.leader,
        streamed=isinstance(job.weights, OnDisk),
        waiting_bytes=waiting,
        disk_bytes=_journal_bytes(job, layers) + max(waiting + _largest_block(job, layers), _folder_bytes(job, layers)),
        seconds=None,
        experts_at_once=experts,
        cluster=cluster,
    )
    return timed(found, job) if measure else found


def timed(plan: Plan, job: Job) -> Plan:
    """The plan of a job with its time, from one window through the first decoder block and one of its layers pruned."""
    return replace(plan, seconds=estimated_seconds(job, plan.experts_at_once))


def _journal_bytes(job: Job, layers: Sequence[PlannedLayer]) -> int:
    """Of the finished layers: the last blocks' are there twice."""
    last = sum(unrounded_bytes(job, layer) for block in job.tail for layer in job.layers_of(block))
    return last + sum(layer.bytes for layer in layers)


def _largest_block(job: Job, layers: Sequence[PlannedLayer]) -> int:
    """Of the layers of one decoder block, which are in the journal by themselves until the whole block is."""
    held: Counter[int | None] = Counter()
    for layer, planned in zip(job.layers, layers, strict=True):
        held[layer.decoder_block] += planned.bytes
    return max(held.values(), default=0)


def _folder_bytes(job: Job, layers: Sequence[PlannedLayer]) -> int:
    """Of the finished folder."""
    embedding = job.model.get_input_embeddings().weight
    tied = any(layer.module.weight is embedding for layer in job.layers_of(None))  # the embedding itself stays
    dense = sum(layer.dense_bytes for layer in layers) - tied * embedding.nbytes
    return model_bytes(job) - dense + sum(layer.bytes for layer in layers)


def planned_layers(layers: Iterable[Layer], config: PruneConfig) -> tuple[PlannedLayer, ...]:
    """The layers with the blocks that they have, and their bytes."""
    return tuple(_planned(layer, config) for layer in layers)


def _planned(layer: Layer, config: PruneConfig) -> PlannedLayer:
    wrapped, ranks, dtype = config.method == "armorfact", config.tensor_parallel, layer.weight.dtype
    pattern, block = Pattern.parse(config.pattern), layer.block if wrapped else None
    stored = LayerFormat(layer.name, layer.shape, pattern, block, None, config.core_dtype, config.wrapper_dtype)
    core = stored.integers.get("values", dtype)
    cuts = Share.of_rows(layer.shape, 0, ranks), Share.of_columns(layer.shape, 0, ranks)
    return PlannedLayer(
        layer.name,
        layer.shape,
        stored.block,
        layer.weight.nbytes,
        stored.nbytes(dtype),
        stored.nbytes(dtype) - replace(stored, block=None, core_dtype=None, wrapper_dtype=None).nbytes(core),
        fitting_block(layer.shape, replace(config, tensor_parallel=1))[0] if wrapped else None,
        max(cut.of_format(stored).nbytes(dtype) for cut in cuts),
        layer.decoder_block is not None,
    )
