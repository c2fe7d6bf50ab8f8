"""How long a run takes, from one window through its first decoder block and one layer of that."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from armorfact_hf.model.experts import run_by_expert
from armorfact_hf.model.moments import Statistics
from armorfact_hf.model.on_disk import OnDisk
from armorfact_hf.model.stream import BlockStream, evaluating
from armorfact_hf.model.structure import Layer
from armorfact_hf.pruning.config import PruneConfig
from armorfact_hf.pruning.job import Job
from armorfact_hf.pruning.layer import prune_layer
from armorfact_hf.pruning.side_by_side import layer_flops
from armorfact_hf.pruning.states import States
from armorfact_hf.pruning.tuning.aims import LOGITS_A_STEP

BACKWARD = 3.5  # what forward, backward and a step cost, in forward passes
SPREAD = 0.02  # the standard deviation of weights that are made up for timing


def estimated_seconds(job: Job, experts: int | None = None) -> float:
    """Time one window and one layer of the first block that is pruned, and scale by the work.

    Args:
        experts: of each experts module, so many have their statistics in memory at a time; None is all.
    """
    first = min(job.last_block if layer.decoder_block is None else layer.decoder_block for layer in job.layers)
    modules = job.modules_of(first)
    statistics = Statistics()
    with evaluating(job.model), run_by_expert(modules), _states_before(job, first) as states:
        states.inputs(first, 0, {}, advance=False)  # warms caches and lazily built parts
        plain = _seconds(lambda: states.inputs(first, 0, {}, advance=False))
        gathering = _seconds(lambda: statistics.add(states.inputs(first, 0, modules, advance=False)))
        reached = [layer for layer in job.layers_of(first) if layer.name in statistics.leader]
        solving = _seconds_a_flop(reached[0], statistics, job.config) * _flops(job) if reached else 0.0
    passes = job.follows_pruned + job.follows_dense * job.follows_pruned
    flowing = len(job.tokens) * ((job.last_block + 1) * (gathering + passes * plain) + _again(job, experts) * gathering)
    priced = job.priced_tokens.numel() / job.tokens.shape[1]  # in windows; run forward, and once more to go back
    pricing = len(job.blocks) * priced * plain * (1 + BACKWARD)
    return flowing + solving + pricing + plain * _tuning_passes(job)


def _again(job: Job, experts: int | None) -> int:
    """How often a window goes through a decoder block again, where statistics of some experts are found anew."""
    counts = {layer.decoder_block: layer.stored_in[1] or 0 for layer in job.layers}
    chunks = {block: -(-count // experts) if experts else 1 for block, count in counts.items()}
    tuned = job.matching is not None
    return sum(k * (2 + tuned + (block in job.tail)) - 1 for block, k in chunks.items() if k > 1)


@contextmanager
def _states_before(job: Job, block: int) -> Iterator[States]:
    """States of one window before a decoder block, which can be run inside of the context.

    Of a model on disk nothing is read for it: the block's weights are made up, and so are its states.
    """
    stream = BlockStream(job.model, job.blocks)
    states = States.before_the_first(stream, job.prefix, job.tokens[:1].split(1))
    if not isinstance(job.weights, OnDisk):
        for index in range(block):
            states.advance(index, 0)
        yield states
        return
    with job.weights.rehearsing():
        given = stream.head_input(job.model.get_output_embeddings(), states.windows[0])
    if block:
        states.hidden[0] = torch.randn_like(given)
    with job.weights.standing_in(block, _made_up):
        yield states


def _made_up(tensor: Tensor) -> None:
    if tensor.ndim > 1:
        tensor.normal_(std=SPREAD)
    else:
        tensor.fill_(1.0)


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
    quick = replace(config, sweeps=min(config.sweeps, 1)) if config.method == "armorfact" else config
    prune_layer(layer, moments, quick)  # compiles, and warms caches
    return _seconds(lambda: prune_layer(layer, moments, config)) / layer_flops(layer)


def _seconds(act: Callable[[], object]) -> float:
    start = time.perf_counter()
    act()
    return time.perf_counter() - start
