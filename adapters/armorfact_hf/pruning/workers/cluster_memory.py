"""How much memory a run takes where others work on it, from the shapes of what is pruned alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from armorfact_hf.model.on_disk import OnDisk
from armorfact_hf.pruning.job import Job
from armorfact_hf.pruning.memory import (
    Memory,
    memory_of,
    model_bytes,
    moments_bytes,
    priced_bytes,
    pricing_work,
    pruned_bytes,
    statistics_bytes,
)


@dataclass(frozen=True)
class ClusterMemory:
    """Bytes that are held at once at most, and by whom.

    Args:
        workers: how many there are on this machine; one is counted where a cluster says how many.
        leader: of the process that was started. worker: of each worker, with the tasks on its cores.
        store: of Ray's object store on all machines, which goes to disk by itself where memory does not hold it.
    """

    workers: int
    leader: Memory
    worker: Memory
    store: int

    @property
    def peak(self) -> int:
        """All of it on this machine."""
        return self.leader.peak + self.workers * self.worker.peak + self.store


def cluster_memory(job: Job, workers: int | None, streamed: bool | None = None) -> ClusterMemory:
    """What a job takes where others work on it.

    Args:
        workers: on this machine; None is as many as a cluster has.
        streamed: whether decoder blocks are read one at a time; by default, as the job stands.
    """
    streamed = isinstance(job.weights, OnDisk) if streamed is None else streamed
    alone, sent = memory_of(job, streamed=streamed, spilled=True), 0 if streamed else model_bytes(job)
    making = job.weights.making if isinstance(job.weights, OnDisk) else 0
    priced = pricing_work(job) if job.priced else 0  # prices are found before there are workers
    inputs = max(_inputs_bytes(job, block) for block in {layer.decoder_block for layer in job.layers})
    # A model travels as bytes, which the sender holds twice, and who receives them while they become tensors.
    leader = Memory(
        weights=alone.weights,
        pruned=alone.pruned,
        states=0 if job.spilled else priced_bytes(job),
        statistics=0,
        work=max(making, 2 * sent, 2 * max(layer.weight.nbytes for layer in job.layers), priced),
    )
    worker = Memory(
        weights=alone.weights,
        pruned=pruned_bytes(job, of_all=not streamed),  # a worker keeps the dense layers of a model in memory
        states=alone.states + 2 * inputs,  # and as they are packed to be sent
        statistics=_solved_at_once(job),
        work=max(alone.work, sent),
    )
    return ClusterMemory(workers or 1, leader, worker, sent + _store_bytes(job, inputs, alone.pruned))


def _inputs_bytes(job: Job, block: int | None) -> int:
    """Of what the layers of a block are given for a window."""
    paired, length = 1 + (job.config.target == "output"), job.tokens.shape[1]
    leaders = [layer for layer in job.layers_of(block) if job.leads(layer)]
    return sum(paired * length * layer.shape[1] * layer.weight.element_size() for layer in leaders)


def _solved_at_once(job: Job) -> int:
    """Of the second moments of the layers that a worker's tasks are at."""
    at_once = torch.get_num_threads() if job.weights.device.type == "cpu" else 1
    return sum(sorted(moments_bytes(job, layer) for layer in job.layers)[-at_once:])


def _store_bytes(job: Job, inputs: int, pruned: int) -> int:
    """Of states behind a block while those before it are there, what its layers are given, and what comes of that."""
    blocks = {layer.decoder_block for layer in job.layers}
    statistics = max(*(statistics_bytes(job, [block]) for block in blocks), statistics_bytes(job, job.tail))
    sent = max(sum(layer.weight.nbytes for layer in job.layers_of(block)) for block in blocks)
    windows = len(job.tokens)
    return job.states_bytes + windows * (job.window_bytes + inputs) + statistics + sent + pruned
