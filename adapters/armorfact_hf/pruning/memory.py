"""How much memory a run takes at most, from the shapes of what is pruned alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from armorfact import Pattern
from armorfact_hf.free_memory import available
from armorfact_hf.layers.format import LayerFormat
from armorfact_hf.model.experts import ExpertLinear
from armorfact_hf.model.on_disk import HEAD, Key, OnDisk
from armorfact_hf.model.structure import Layer
from armorfact_hf.pruning.job import Job

# Copies of H and of W in float32 that one layer takes at most (benchmarks/memory.py), and about one for what an
# allocator keeps: while SparseGPT factors H in float64, and while the factors are swept and measured.
PHASES = (6, 6), (2, 12)


@dataclass(frozen=True)
class Memory:
    """Bytes that are held at once at most.

    Args:
        weights: of the model, or of as much of it as is in memory at a time. pruned: of what replaces them meanwhile.
        states: of the calibration windows, in every copy that is kept of them.
        statistics: second moments of the largest decoder block, or, where they wait in memory, of the last ones.
        work: of the largest factorizations, of tuning a block, or of making a tensor of stored ones.
    """

    weights: int
    pruned: int
    states: int
    statistics: int
    work: int

    @property
    def peak(self) -> int:
        """All of it."""
        return self.weights + self.pruned + self.states + self.statistics + self.work


def memory_of(
    job: Job, streamed: bool | None = None, spilled: bool | None = None, experts: int | None = None
) -> Memory:
    """What a job takes; by default, as it stands.

    Args:
        streamed: whether decoder blocks are read one at a time. spilled: whether states wait on disk.
        experts: so many of each experts module have their statistics in memory at a time; None is all.
    """
    again = len(job.tail) if experts is not None else 0  # states from which those of the last blocks are found anew
    streamed = isinstance(job.weights, OnDisk) if streamed is None else streamed
    spilled = job.spilled if spilled is None else spilled
    return Memory(
        weights=_held_bytes(job) if streamed else model_bytes(job),
        pruned=pruned_bytes(job),
        states=max(
            job.window_bytes * (3 if spilled else len(job.tokens) * (job.copies_of_states + again)),
            0 if spilled else priced_bytes(job),
        ),
        statistics=_statistics_bytes(job, spilled, experts),
        work=max(pricing_work(job), _tuning_bytes(job)),
    )


def model_bytes(job: Job) -> int:
    """Of the whole model."""
    return sum(parameter.nbytes for parameter in job.model.parameters())


def _held_bytes(job: Job) -> int:
    """What lies around the decoder blocks, and the blocks (and the head) that are held together."""
    bytes_of: dict[Key, int] = {
        index: sum(parameter.nbytes for parameter in block.parameters()) for index, block in enumerate(job.blocks)
    }
    head, embedding = job.model.get_output_embeddings(), job.model.get_input_embeddings()
    own_head = head is not None and getattr(head, "weight", None) is not embedding.weight
    bytes_of[HEAD] = sum(parameter.nbytes for parameter in head.parameters()) if own_head else 0
    around = model_bytes(job) - sum(bytes_of.values())
    words = bytes_of[HEAD] if job.uses_head else 0
    together = sum(bytes_of[block] for block in job.tail) + words
    return around + max(*(bytes_of[block] for block in range(job.last_block + 1)), together)


def pruned_bytes(job: Job, of_all: bool = False) -> int:
    """Of what is there beside the dense layers that it replaces: of a block or the last ones, or of all layers."""

    def nbytes(layer: Layer) -> int:
        return unrounded_bytes(job, layer)

    return sum(map(nbytes, job.layers)) if of_all else _largest(job, job.layers, nbytes)


def unrounded_bytes(job: Job, layer: Layer) -> int:
    """Of what replaces a layer, before any of it is rounded to integers."""
    block = layer.block if job.config.method == "armorfact" else None
    return LayerFormat(layer.name, layer.shape, Pattern.parse(job.config.pattern), block).nbytes(layer.weight.dtype)


def _largest(job: Job, layers: Iterable[Layer], bytes_of: Callable[[Layer], int]) -> int:
    """The sum over the layers of one decoder block, of that with the largest, or over those of the last ones."""
    by_block: dict[int | None, int] = {}
    for layer in layers:
        by_block[layer.decoder_block] = by_block.get(layer.decoder_block, 0) + bytes_of(layer)
    return max(max(by_block.values(), default=0), sum(by_block.get(block, 0) for block in job.tail))


def experts_at_once(job: Job) -> int | None:
    """Of each experts module, how many have their second moments in memory at a time; None is all of them.

    As the job says, or by the memory that is free beside all else that the job takes: at least one.
    """
    if job.experts_at_once is not None:
        return job.experts_at_once
    counts = [layer.stored_in[1] or 0 for layer in job.layers]
    in_memory = 0 if isinstance(job.weights, OnDisk) else model_bytes(job)

    def fits(experts: int | None) -> bool:
        return memory_of(job, experts=experts).peak - in_memory <= available(job.weights.device)

    if not max(counts) or fits(None):
        return None
    return next((k for k in _halves(max(counts)) if fits(k)), 1)


def _halves(count: int) -> Iterator[int]:
    """count / 2, count / 4, …, rounded up, above 1."""
    while count > 2:
        count = -(-count // 2)
        yield count


def statistics_bytes(job: Job, blocks: Sequence[int | None], experts: int | None = None) -> int:
    """Of the second moments of these decoder blocks, float64; layers that share an input share them.

    Args:
        experts: of each experts module, those of so many are counted, and their sum over all; None is all.
    """
    leaders = (layer for block in blocks for layer in job.layers_of(block) if job.leads(layer))
    return sum(moments_bytes(job, layer) for layer in leaders if experts is None or _number(layer) <= experts)


def moments_bytes(job: Job, layer: Layer) -> int:
    """Of the second moments of the inputs of one layer, float64."""
    paired, size = 1 + (job.config.target == "output"), layer.shape[1]
    return 8 * paired * size * size


def waiting_bytes(job: Job, experts: int | None) -> int:
    """Of what waits on disk between decoder blocks, if anything does.

    Args:
        experts: as for `memory_of`. Where statistics are found anew, the states that they are found from wait.
    """
    if not job.spilled:
        return 0
    again = len(job.tail) * len(job.tokens) * job.window_bytes
    pruning = job.states_bytes + (statistics_bytes(job, job.tail) if experts is None else again)
    return max(pruning, priced_bytes(job))


def pricing_work(job: Job) -> int:
    """Of the largest factorizations, with what a decoder block shows beside them while prices are found."""
    return _solving_bytes(job) + _shown_bytes(job)


def _shown_bytes(job: Job) -> int:
    """Of the inputs of a decoder block's layers and the gradients at their outputs, while prices are found."""
    tokens = job.priced_tokens.numel()
    return _largest(job, job.priced, lambda layer: tokens * sum(layer.shape) * layer.weight.element_size())


def priced_bytes(job: Job) -> int:
    """Of the states before every decoder block, while prices are found."""
    return len(job.blocks) * job.priced_tokens.numel() * (job.window_bytes // job.tokens.shape[1])


def _number(layer: Layer) -> int:
    """That of its expert, -1 for any other layer: the first n + 1 stand for n experts at work and the sum over all."""
    return layer.module.expert if isinstance(layer.module, ExpertLinear) else -1


def _statistics_bytes(job: Job, spilled: bool, experts: int | None) -> int:
    blocks = {layer.decoder_block for layer in job.layers}
    largest = max(statistics_bytes(job, [block], experts) for block in blocks)
    waiting = statistics_bytes(job, job.tail, None if experts is None else 0)
    return largest if spilled and experts is None else max(largest, waiting)


def _solving_bytes(job: Job) -> int:
    """Of the largest factorizations at a time, or of making the tensors that they begin with."""
    compared = len(job.config.baselines)  # a weight each, until the losses are known

    def nbytes(layer: Layer) -> int:
        d_out, d_in = layer.shape
        return 4 * max(grams * d_in**2 + (weights + compared) * d_out * d_in for grams, weights in PHASES)

    at_once = torch.get_num_threads() if job.weights.device.type == "cpu" else 1
    making = job.weights.making if isinstance(job.weights, OnDisk) else 0
    return max(making, sum(sorted(map(nbytes, job.layers))[-at_once:])) + _product_bytes(job)


def _product_bytes(job: Job) -> int:
    """Of the largest weight in the decoder blocks: PyTorch keeps a copy of it in the order that its products want."""
    weights = (weight for block in job.blocks for weight in block.parameters() if weight.ndim > 1)
    return max(weight[0].nbytes if weight.ndim == 3 else weight.nbytes for weight in weights)


def _tuning_bytes(job: Job) -> int:
    """Factors in float32 with gradient, momentum, a copy to undo with and a step; what one window leaves to go back.

    An estimate: every layer keeps its input and output in 16 bits, and as much again lies between the layers.
    """
    if job.matching is None:
        return 0
    pattern, length = Pattern.parse(job.config.pattern), job.tokens.shape[1]

    def nbytes(layer: Layer) -> int:
        (d_out, d_in), (b_out, b_in) = layer.shape, layer.block or (0, 0)
        factors = d_out * d_in * pattern.keep // pattern.group + b_out * d_out + b_in * d_in
        dense = 2 * d_out * d_in  # W, formed anew for every step, and its gradient
        return 20 * factors + 4 * dense + 4 * length * (d_out + d_in)

    return _largest(job, job.layers, nbytes)
