"""Block matching: tune a pruned decoder block until it computes what the dense model computes there.

After a block's layers are factorized one by one, their A, B and kept values of C are trained together, supports fixed,
towards an aim (`armorfact_hf.pruning.tuning.aims`): the dense model's states behind the block. At the end the last few
blocks are trained once more, together, towards its words.
The block is given what the pruned model makes of the text. The target is the whole block's, so that one layer may make
good what another lost, and what earlier blocks lost. (Aiming each *layer* at the dense output instead is a regression
on noisy inputs: it shrinks, and shrinkage compounds; see docs/results.md.)

Some windows are kept aside. If the error on them does not fall, measured with the factors as they are stored, the block
keeps those it had.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn

from armorfact import BlockDiagonal, Core, Factors
from armorfact.gauge import canonical
from armorfact_hf.free_memory import ran_out
from armorfact_hf.layers.linear import FactorizedLinear
from armorfact_hf.layers.stack import master_of
from armorfact_hf.model.experts import put_layers_
from armorfact_hf.model.rehearsal import CANNOT_BE_TUNED
from armorfact_hf.pruning.schedule import FACTORS, Matching, kept_aside
from armorfact_hf.pruning.tuning.aims import Aim, StateAim
from armorfact_hf.pruning.tuning.muon import Muon

MOST_HALVINGS = 8
FULL_PRECISION = torch.float32, torch.float64  # precisions that a block can be tuned in without mixing
NOT_MIXED = "not tuned: the block does not run in mixed precision; a model in float32 is tuned without"

Layers = Mapping[str, FactorizedLinear]


@dataclass(frozen=True)
class BlockReport:
    """What matching did to a decoder block.

    Args:
        decoder_block: its index.
        before, after: the distance from its aim, the mean over the windows kept aside, with the layers as factorized
            and as tuned, in the dtype of the model; None where what was tuned gives no finite one.
        kept: whether the tuned factors are what is stored.
        notes: what went wrong on the way.
        unit: of the distance, see `armorfact_hf.pruning.tuning.aims`.
        through: the last of several decoder blocks that were tuned together, or None.
        rounded: the distance with the layers as they are stored, where the settings have a ``core_dtype``; it is
            rounded to after a block is tuned, and in the last blocks after they are tuned together.
    """

    decoder_block: int
    before: float
    after: float | None
    kept: bool
    notes: tuple[str, ...] = ()
    unit: str = StateAim.unit
    through: int | None = None
    rounded: float | None = None


def match_block_(
    model: nn.Module,
    layers: Layers,
    aim: Aim,
    matching: Matching,
    decoder_block: int,
) -> tuple[dict[str, FactorizedLinear], BlockReport]:
    """Tune the pruned layers of one decoder block, in place in the model.

    Args:
        model: holds the layers under their names; no parameter of it asks for gradients.
        layers: the pruned layers of the block by name, with wrappers or without.
        aim: what they are tuned towards.
        matching: the settings. decoder_block: the index of the block, which seeds the order of the windows.

    Returns:
        The layers that the model holds now, in the dtype of those given, and the report.
    """
    before, mixed = distance_aside(aim), _runs_mixed(aim)
    if not mixed and any(layer.values.dtype not in FULL_PRECISION for layer in layers.values()):
        return dict(layers), BlockReport(decoder_block, before, before, False, (NOT_MIXED,), aim.unit)
    masters = {name: master_of(layer).use_(None) for name, layer in layers.items()}
    put_layers_(model, masters)
    muon = Muon(_parameters(masters))
    notes = _train(muon, aim, matching, decoder_block, mixed)
    tuned, after = _as_stored(model, masters, layers, aim)
    if after is None:  # after the last step no other has looked at what it did
        muon.undo_()
        notes.append("what matching ended with was not finite: its last step was undone")
        tuned, after = _as_stored(model, masters, layers, aim)
    kept = after is not None and after < before and len(notes) <= MOST_HALVINGS
    if not kept:
        put_layers_(model, layers)
    return dict(tuned if kept else layers), BlockReport(decoder_block, before, after, kept, tuple(notes), aim.unit)


def _as_stored(model: nn.Module, masters: Layers, layers: Layers, aim: Aim) -> tuple[Layers, float | None]:
    """The trained layers as they are stored, which the model holds now, and the distance if that is a finite one."""
    tuned = {name: _stored(masters[name], layer) for name, layer in layers.items()}
    put_layers_(model, tuned)
    distance = distance_aside(aim)
    return tuned, distance if math.isfinite(distance) else None


@torch.no_grad()
def distance_aside(aim: Aim) -> float:
    """How far from an aim a model is, the mean over the windows kept aside."""
    distances = [aim.distance(aim.run(window), window) for window in kept_aside(aim.windows)]
    return sum(distances) / len(distances)


@torch.no_grad()
def _stored(master: FactorizedLinear, like: FactorizedLinear) -> FactorizedLinear:
    """The trained layer in the canonical gauge, rounded to the dtype that it is stored in."""
    dtype, core = like.values.dtype, master.core
    bias = None if master.bias is None else master.bias.to(dtype)
    if master.left is None or master.right is None:
        return FactorizedLinear.of(replace(core, values=core.values.to(dtype)), bias=bias)
    found = canonical(Factors(master.left.detach(), core.dense(), master.right.detach())).astype(dtype)
    core = Core.from_dense(found.core, core.pattern)
    return FactorizedLinear.of(core, BlockDiagonal(found.left), BlockDiagonal(found.right), bias)


def _parameters(masters: Layers) -> dict[str, nn.Parameter]:
    """What is trained."""
    factors = {f"{name}.{part}": getattr(layer, part) for name, layer in masters.items() for part in FACTORS}
    return {name: factor.requires_grad_(True) for name, factor in factors.items() if factor is not None}


def _train(muon: Muon, aim: Aim, matching: Matching, seed: int, mixed: bool) -> list[str]:
    """Steps over the windows, one each, in an order drawn from the seed; the notes of what had to be undone."""
    device = next(iter(muon.parameters.values())).device
    order = _order(aim.windows, matching.passes, seed)
    notes: list[str] = []
    for step, window in enumerate(order):
        muon.zero_gradients_()
        if _backward(aim, window, step, device, mixed) and muon.finite:
            muon.step_(matching.rate_at(step, len(order)) / 2 ** len(notes))
        else:
            muon.undo_()
            notes.append(f"step {step + 1} of matching was not finite: the one before was undone, and the rate halved")
        if len(notes) > MOST_HALVINGS:
            break
    return notes


def _order(windows: int, passes: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    training = [window for window in range(windows) if window not in kept_aside(windows)]
    return [training[k] for _ in range(passes) for k in torch.randperm(len(training), generator=generator).tolist()]


@torch.no_grad()
def _runs_mixed(aim: Aim) -> bool:
    """Whether a block can be run in mixed precision: one that puts tensors together by hand may fail, as experts do."""
    window = kept_aside(aim.windows)[0]
    try:
        with torch.autocast(aim.run(window).device.type, torch.bfloat16):
            aim.run(window)
    except RuntimeError as error:
        if ran_out(error):
            raise
        return False
    return True


@torch.enable_grad()
def _backward(aim: Aim, window: int, step: int, device: torch.device, mixed: bool) -> bool:
    """Add the gradients of the distance on one window, in mixed precision if ``mixed``; whether it is finite."""
    with torch.autocast(device.type, torch.bfloat16, enabled=mixed):
        output = aim.run(window)
    if not output.requires_grad:
        raise ValueError(CANNOT_BE_TUNED)
    distance, gradient = aim.gradient(output, window, step)
    if not math.isfinite(distance):
        return False
    output.backward(gradient.to(output.dtype))
    return True
