"""What other processes do of a run: windows through blocks, Gram matrices, single layers. All of it may be repeated.

A `Worker` holds the model, of one on disk the decoder blocks that it is at, and keeps nothing else. States come with
every call and go back with its result, so a worker that was killed and started again needs no memory of its own, and
any of them may take any window.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import ray
import torch
from torch import Tensor, nn

from armorfact_hf.layers.linear import FactorizedLinear
from armorfact_hf.model.experts import put_layers_
from armorfact_hf.model.moments import Inputs, Moments, Statistics
from armorfact_hf.model.on_disk import HEAD, Key
from armorfact_hf.model.stream import BlockStream
from armorfact_hf.model.structure import Layer
from armorfact_hf.pruning.config import PruneConfig
from armorfact_hf.pruning.experts import Pool
from armorfact_hf.pruning.job import Job
from armorfact_hf.pruning.layer import LayerReport, prune_layer
from armorfact_hf.pruning.notes import damping_noted
from armorfact_hf.pruning.resume.entry import Pruned
from armorfact_hf.pruning.spilled import Hidden
from armorfact_hf.pruning.states import States
from armorfact_hf.pruning.workers.flow import Flow
from armorfact_hf.pruning.workers.tuning import Tuned, distance_from_aim, layers_by_name, tune_block, tune_tail

Ref = Any  # a `ray.ObjectRef`, which has no type parameter where Ray is not installed
Part = tuple[list[Tensor] | None, ...] | None


@dataclass(frozen=True)
class Held:
    """The states of one window, and in which form the blocks so far returned theirs.

    Args:
        hidden: (1, length, width), or None before the first block.
        extras: of `BlockStream`.
    """

    hidden: Tensor | None = None
    extras: Mapping[int, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Fetched:
    """The states of every window, each fetched when it is asked for; see `armorfact_hf.pruning.spilled.Hidden`.

    Args:
        refs: references to a `Held` by window.
    """

    refs: list[Ref]

    def __len__(self) -> int:
        return len(self.refs)

    def __getitem__(self, window: int) -> Tensor | None:
        return ray.get(self.refs[window]).hidden

    def __setitem__(self, window: int, states: Tensor | None) -> None:
        self.refs[window] = ray.put(Held(states))

    def copy(self) -> Fetched:
        """Another list of the same states."""
        return Fetched(list(self.refs))


class Worker:
    """A process that holds the model, or the decoder blocks of it that it is at.

    Every method is given ``replaced``, references to the pruned layers of the block at work, or of the last blocks:
    what the model lacks of them is put into it first. Blocks before are not run again, and those behind are dense.

    Args:
        made: makes the job; it is called with the first work, so that its errors are told as those of work.
        threads: that PyTorch computes with.
    """

    def __init__(self, made: Callable[[], Job], threads: int) -> None:
        torch.set_num_threads(threads)
        self.made, self.at_work, self.keys, self.put = made, ExitStack(), tuple[Key, ...](), 0

    @cached_property
    def job(self) -> Job:
        """What is pruned."""
        return self.made()

    @cached_property
    def stream(self) -> BlockStream:
        """Runs the blocks."""
        return BlockStream(self.job.model, self.job.blocks)

    def inputs(
        self, index: int | None, window: int, pruned: Held | None, dense: Held | None, replaced: Sequence[Ref]
    ) -> tuple[Any, ...]:
        """What the layers of a block are given for a window.

        Returns:
            For each layer that was called its leader; the dense model's state behind the block, or None; then, for each
            of the block's layers, its calls in the one or two models that count, or None unless it is a leader.
        """
        self._come_to(() if index is None else (index,), replaced)
        one, other = (None if held is None else self._states_of(window, held) for held in (pruned, dense))
        flow = Flow(self.job, [window], _untold, one, other)
        seen = flow.inputs(index, window)
        leader, names = seen[0].leader, [layer.name for layer in self.job.layers_of(index)]
        parts = [tuple(x.calls.get(name) for x in seen) if leader.get(name) == name else None for name in names]
        return leader, None if flow.dense is None else self._held(flow.dense, window), *parts

    def advance(self, blocks: Sequence[int], window: int, held: Held, replaced: Sequence[Ref]) -> tuple[bool, Held]:
        """True, and the state of a window behind some consecutive blocks."""
        self._come_to(tuple(blocks), replaced)
        states = self._states_of(window, held)
        for index in blocks:
            states.advance(index, window)
        return True, self._held(states, window)

    def pass_by(self, index: int, window: int, held: Held, replaced: Sequence[Ref]) -> tuple[bool, Held]:
        """True, and the state of a window of the dense model behind a block, which is dense."""
        self._come_to((index,), replaced)
        states = self._states_of(window, held)
        Flow(self.job, [window], _untold, None, states).pass_by(index)
        return True, self._held(states, window)

    def tune(
        self, index: int | None, pruned: Pruned, given: Sequence[Ref], dense: Sequence[Ref], replaced: Sequence[Ref]
    ) -> Tuned:
        """Tune the layers of a block, or, with None, of the last ones.

        Args:
            given, dense: references to the states of every window before and, in the dense model, behind them.
        """
        states, layers = self._around(index, pruned, given, dense, replaced), layers_by_name(pruned)
        if index is None:
            return tune_tail(self.job, layers, states, _silent)
        return tune_block(self.job, index, layers, states, _silent)

    def distance(
        self, index: int | None, pruned: Pruned, given: Sequence[Ref], dense: Sequence[Ref], replaced: Sequence[Ref]
    ) -> float:
        """How far a block with these layers, or, with None, the last ones, is from what it was tuned towards."""
        states = self._around(index, pruned, given, dense, replaced)
        return distance_from_aim(self.job, index, states, _silent)

    def _around(
        self, index: int | None, pruned: Pruned, given: Sequence[Ref], dense: Sequence[Ref], replaced: Sequence[Ref]
    ) -> tuple[States, States]:
        """The states before the block with these layers, or, with None, the last ones, and the dense model's behind."""
        self._come_to((*self.job.tail, HEAD) if index is None else (index,), replaced)
        put_layers_(self.job.model, layers_by_name(pruned))
        before, behind = (self._states(ray.get(refs[0]), Fetched(list(refs))) for refs in (given, dense))
        return before, behind

    def act(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """What a function returns, called where this worker's device is."""
        return function(*arguments)

    def _come_to(self, keys: tuple[Key, ...], replaced: Sequence[Ref]) -> None:
        """Hold the blocks, or the head, of these keys, and put in what replaces their layers so far."""
        if keys != self.keys:
            self.at_work.close()
            self.at_work.enter_context(self.job.weights.held(*keys))
            self.keys, self.put = keys, 0
        for pruned in replaced[self.put :]:
            put_layers_(self.job.model, layers_by_name(ray.get(pruned)))
        self.put = len(replaced)

    def _states_of(self, window: int, held: Held) -> States:
        """The states of one window, without those of the others."""
        return self._states(held, [held.hidden if k == window else None for k in range(len(self.job.tokens))])

    def _states(self, one: Held, hidden: Hidden) -> States:
        """States of windows, which tell the form that blocks return theirs in as this one does."""
        self.stream.extras.update(one.extras)
        return States(self.stream, self.job.prefix, self.job.tokens.split(1), hidden)

    def _held(self, states: States, window: int) -> Held:
        return Held(states.hidden[window], dict(self.stream.extras))


def gather(name: str, parts: Sequence[Ref]) -> Moments:
    """The moments of a leader's inputs, window by window: the same sum in the same order as in one process.

    Args:
        parts: references to what `Worker.inputs` returned for this layer, in the order of the windows.
    """
    found = Statistics()
    for ref in parts:  # one at a time: those of a wide layer do not fit into memory together
        part: Part = ray.get(ref)
        if part is not None:
            found.add(*(Inputs({} if calls is None else {name: calls}) for calls in part))
    return found.of(name)


def prior(moments: Sequence[Ref]) -> Moments | None:
    """What the experts borrow that these references are of, one or more, in the order of the model."""
    pool = Pool(())
    for ref in moments:  # one at a time
        pool.count(ray.get(ref))
    return pool.prior()


def lend(moments: Moments, prior: Moments) -> Moments:
    """The moments of an expert with what it borrows."""
    return replace(moments, gram=moments.gram + prior.gram)


def alone(layer: Layer) -> Layer:
    """A layer to send: of an expert only its own weights, not the stack that they are a part of."""
    if not layer.stack:
        return layer
    (d_out, d_in), bias = layer.shape, layer.module.bias
    linear = nn.Linear(d_in, d_out, bias is not None, device="meta")
    linear.weight = nn.Parameter(layer.weight.clone(), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    return replace(layer, module=linear)


def prune(layer: Layer, moments: Moments, config: PruneConfig) -> tuple[FactorizedLinear, LayerReport]:
    """What replaces a layer, and the report."""
    with damping_noted():
        return prune_layer(layer, moments, config)


def _untold(index: int, window: int) -> None:
    """The process that leads the run tells."""


def _silent(what: str) -> None:
    """The process that leads the run tells."""
