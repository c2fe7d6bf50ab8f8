"""Tune the pruned layers of a block, or of the last blocks, where the model and the states of all windows are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from armorfact_hf.layers.linear import FactorizedLinear
from armorfact_hf.model.moments import Moments
from armorfact_hf.model.stream import frozen
from armorfact_hf.model.token_divergence import BodyAndHead, TokenDivergence
from armorfact_hf.pruning.job import Job
from armorfact_hf.pruning.layer import with_tuned_loss
from armorfact_hf.pruning.resume.entry import Pruned
from armorfact_hf.pruning.schedule import Matching
from armorfact_hf.pruning.states import States
from armorfact_hf.pruning.tuning.aims import Aim, StateAim, TokenAim
from armorfact_hf.pruning.tuning.matching import BlockReport, distance_aside, match_block_

Tuned = tuple[dict[str, FactorizedLinear], BlockReport]
Notify = Callable[[str], None]


def tune_block(
    job: Job, index: int, layers: Mapping[str, FactorizedLinear], states: tuple[States, States], notify: Notify
) -> Tuned:
    """Tune the layers of a block, which are in the model, towards the states of the dense model behind it.

    Args:
        states: those that the block is given, and the dense model's behind it.
        notify: is called with what is done before a window trains.
    """
    return _tune(job, layers, _aim(job, index, states, notify), _matching(job).of(index), index)


def tune_tail(job: Job, layers: Mapping[str, FactorizedLinear], states: tuple[States, States], notify: Notify) -> Tuned:
    """Tune the layers of the last blocks, which are in the model, towards the words of the dense model.

    Args:
        states: those before the first of these blocks, and the dense model's behind the last.
        notify: as for `tune_block`.
    """
    tuned, matched = _tune(job, layers, _aim(job, None, states, notify), _matching(job).of_tail, job.tail[0])
    return tuned, replace(matched, through=job.tail[-1])


def distance_from_aim(job: Job, index: int | None, states: tuple[States, States], notify: Notify) -> float:
    """How far a block as it is in the model, or, with None, the last ones, is from what it is tuned towards.

    Args:
        states: as for `tune_block` or `tune_tail`.
    """
    return distance_aside(_aim(job, index, states, notify))


def with_losses(job: Job, pruned: Pruned, tuned: Tuned, moments: Callable[[str], Moments]) -> Pruned:
    """The layers as tuned, with their losses now; as they were, if those are kept."""
    layers, matched = tuned
    if not matched.kept:
        return pruned
    dense = job.by_name
    return [
        (layers[x.name], with_tuned_loss(x, dense[x.name], layers[x.name], moments(x.name), job.config))
        for _, x in pruned
    ]


def layers_by_name(pruned: Pruned) -> dict[str, FactorizedLinear]:
    """The layers under their names in the model."""
    return {report.name: layer for layer, report in pruned}


def _aim(job: Job, index: int | None, states: tuple[States, States], notify: Notify) -> Aim:
    if index is None:
        return _words(job, *states, lambda: _notified(notify, "the last decoder blocks"))
    given, dense = states

    def run(window: int) -> Tensor:
        gradients = _notified(notify, f"decoder block {index + 1}")
        return given.stream.run(index, given.windows[window], given.hidden[window], gradients)

    return StateAim(run, cast(Sequence[Tensor], dense.hidden))


def _words(job: Job, given: States, dense: States, notify: Callable[[], bool]) -> TokenAim:
    """The words of the dense model.

    Args:
        given: the states before the first of the last blocks. dense: those of the dense model behind the last one.
        notify: is called before each window; says whether gradients are going to be asked for.
    """
    stream, tokens = given.stream, given.windows
    parts = BodyAndHead(job.model, stream)

    def run(window: int) -> Tensor:
        return stream.head_input(parts.head, tokens[window], given.hidden[window], job.tail.start, notify())

    def recall(window: int) -> Tensor:
        return stream.head_input(parts.head, tokens[window], dense.hidden[window])

    return TokenAim(run, job.tokens, recall, TokenDivergence(parts, parts))


def _tune(job: Job, layers: Mapping[str, FactorizedLinear], aim: Aim, matching: Matching, index: int) -> Tuned:
    with frozen(job.model):
        return match_block_(job.model, layers, aim, matching, index)


def _matching(job: Job) -> Matching:
    if job.matching is None:
        raise RuntimeError("this job tunes no blocks")
    return job.matching


def _notified(notify: Notify, what: str) -> bool:
    """Whether gradients are enabled: a window is a unit of work then."""
    notify(f"{what}, tuned as a whole")
    return torch.is_grad_enabled()
