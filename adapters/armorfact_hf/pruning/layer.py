"""Prune one linear layer: from its weight and the second moments of its inputs to a `FactorizedLinear`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import cast

import torch
from torch import Tensor

from armorfact import BlockDiagonal, Core, Pattern, factorize, quantize_core, quantize_wrappers
from armorfact_hf.layers.linear import FactorizedLinear
from armorfact_hf.model.moments import Moments
from armorfact_hf.model.structure import Layer
from armorfact_hf.pruning.config import OF_FULL_GRAM, PruneConfig
from armorfact_hf.pruning.losses import energy, exact_weight, layer_losses, left_out, one_shot
from armorfact_hf.pruning.notes import noting


@dataclass(frozen=True)
class LayerReport:
    """What became of one layer.

    Args:
        name, decoder_block, shape, block: which layer, and the sizes of its wrappers' blocks (None without).
        losses: tr((W - W') H (W - W')') / tr(W H W') by method, H the plain Gram matrix, also of methods that
            look at less of it; for W' as it is stored, in its dtype.
        objective_loss, objective_initial_loss: the relative loss that the solver minimized, at its end and start.
        sweeps: the number of the last sweep that was accepted; 0 where the start was kept, or nothing sweeps.
        seconds: spent on this layer's own method, the baselines not counted.
        dense_bytes, bytes: of the weight before and of what replaces it.
        tokens: that the statistics were gathered from; of an expert's layer, those that were routed to it. H is then
            shrunk towards that of all the module's experts (`armorfact_hf.pruning.experts`).
        status: how the solver ended. notes: warnings on the way.
        factorized_loss: as in ``losses``, of this method, before the layer was tuned with its decoder block.
        unrounded_loss: the same, before the core was rounded to int8.
    """

    name: str
    decoder_block: int | None
    shape: tuple[int, int]
    block: tuple[int, int] | None
    losses: dict[str, float]
    objective_loss: float
    objective_initial_loss: float
    sweeps: int
    seconds: float
    dense_bytes: int
    bytes: int
    tokens: int
    status: str
    notes: tuple[str, ...] = ()
    factorized_loss: float | None = None
    unrounded_loss: float | None = None


def mean_loss(layers: Sequence[LayerReport], method: str) -> float:
    """The mean relative loss over layers by a method.

    Raises:
        ValueError: no layers, or one whose report lacks the method.
    """
    if lacking := [layer.name for layer in layers if method not in layer.losses]:
        raise ValueError(f"{method!r} was not measured on {', '.join(lacking)}: ask for it in `baselines`")
    return fmean(layer.losses[method] for layer in layers)


def prune_layer(layer: Layer, moments: Moments, config: PruneConfig) -> tuple[FactorizedLinear, LayerReport]:
    """What replaces a layer, and its report.

    Raises:
        ValueError: the weight holds NaN or infinite values; the message names the layer.
    """
    try:
        return _prune(layer, moments, config)
    except ValueError as error:
        raise ValueError(f"{layer.name}: {error}") from error


def _prune(layer: Layer, moments: Moments, config: PruneConfig) -> tuple[FactorizedLinear, LayerReport]:
    weight = _weight(layer)
    start = time.perf_counter()
    target = _target(weight.float(), moments, config)
    notes = left_out(config, layer)
    with noting(notes):
        fitted = _fit(target, moments.gram, config, layer)
    seconds = time.perf_counter() - start
    pruned = FactorizedLinear.of(*fitted.factors, _bias(layer))
    report = LayerReport(
        name=layer.name,
        decoder_block=layer.decoder_block,
        shape=layer.shape,
        block=pruned.block,
        losses=layer_losses(target, pruned, moments.gram, config, layer),
        objective_loss=fitted.loss,
        objective_initial_loss=fitted.initial_loss,
        sweeps=fitted.sweeps,
        seconds=seconds,
        dense_bytes=weight.nbytes,
        bytes=pruned.nbytes - (0 if pruned.bias is None else pruned.bias.nbytes),
        tokens=moments.tokens,
        status=fitted.status,
        notes=tuple(notes),
    )
    return pruned, report


def with_tuned_loss(
    report: LayerReport, layer: Layer, tuned: FactorizedLinear, moments: Moments, config: PruneConfig
) -> LayerReport:
    """The report of a layer whose factors were tuned: its loss is that of what is stored now.

    Args:
        layer: the dense one. moments: of its inputs. tuned: what takes its place.
    """
    target = _target(_weight(layer).float(), moments, config)
    losses = layer_losses(target, tuned, moments.gram, replace(config, baselines=()), layer)
    before = report.losses[config.method] if report.factorized_loss is None else report.factorized_loss
    return replace(report, losses=report.losses | losses, factorized_loss=before)


def round_layer(
    layer: Layer, pruned: FactorizedLinear, report: LayerReport, moments: Moments, config: PruneConfig
) -> tuple[FactorizedLinear, LayerReport]:
    """A pruned layer with its core in int8, and its wrappers if the settings ask for it, and its report.

    What stays free is solved for once more, towards what they were made for: W, or, where the layer was tuned with its
    decoder block, the product A C B that came of that.

    Args:
        layer: the dense one. moments: of its inputs.
    """
    target, tuned = _target(_weight(layer).float(), moments, config), report.factorized_loss is not None
    left, right = cast(tuple[BlockDiagonal, BlockDiagonal], pruned.wrappers)
    aim, gram = exact_weight(pruned).float() if tuned else target, _given(moments.gram, config)
    result = quantize_core((left, pruned.core, right), aim, gram, normalize=_normalize(config))
    status = f"{report.status}; in int8 {result.status}"
    if config.wrapper_dtype is not None:
        result = quantize_wrappers(result, aim, gram, normalize=_normalize(config))
        status += f"; {result.status}"
    rounded = FactorizedLinear.of(result.core, result.left, result.right, pruned.bias)
    losses = layer_losses(target, rounded, moments.gram, replace(config, baselines=()), layer)
    return rounded, replace(
        report,
        losses=report.losses | losses,
        unrounded_loss=report.losses[config.method],
        bytes=report.bytes - pruned.nbytes + rounded.nbytes,
        status=status,
    )


def _weight(layer: Layer) -> Tensor:
    """W, row after row in memory: bits must not depend on what else is stored around it."""
    return layer.weight.contiguous()


def _bias(layer: Layer) -> Tensor | None:
    return None if layer.module.bias is None else layer.module.bias.detach()


def _target(weight: Tensor, moments: Moments, config: PruneConfig) -> Tensor:
    r"""The weight to come close to.

    With the cross moment :math:`X_d X^\top` of dense and pruned inputs, :math:`\|W X_d - \hat W X\|^2` shrunk by
    :math:`\lambda\|(W - \hat W)\operatorname{diag}(H)^{1/2}\|^2` is, up to a constant,
    :math:`\operatorname{tr}((V - \hat W)(H + \lambda\operatorname{diag}H)(V - \hat W)^\top)` with
    :math:`V = W + W (X_d X^\top - H)(H + \lambda\operatorname{diag}H)^{-1}`.
    """
    if config.target == "weight" or moments.cross is None:
        return weight
    # Rounding alone must not make the system singular where no shrinkage was asked for.
    gram = shrunk(moments.gram, max(config.diagonal_weight, 1e-6))
    alive = gram.diagonal() > 0
    gram.diagonal()[~alive] = 1.0
    moved = weight.double() @ (moments.cross - moments.gram)
    return (weight.double() + torch.linalg.solve(gram, moved, left=False)).to(weight.dtype)


def shrunk(gram: Tensor, diagonal_weight: float) -> Tensor:
    """H + λ diag(H), a new matrix."""
    result = gram.clone()
    result.diagonal().mul_(1 + diagonal_weight)
    return result


def _given(gram: Tensor, config: PruneConfig) -> Tensor:
    """H as the solver is given it."""
    if config.objective in OF_FULL_GRAM:
        return shrunk(gram, config.diagonal_weight).float()
    return gram.diagonal().float()


def _normalize(config: PruneConfig) -> str | None:
    return "nowag" if config.objective in ("normalized", "nowag") else None


@dataclass(frozen=True)
class _Fit:
    factors: tuple[Core, BlockDiagonal | None, BlockDiagonal | None]
    loss: float
    initial_loss: float
    sweeps: int
    status: str


def _fit(weight: Tensor, gram: Tensor, config: PruneConfig, layer: Layer) -> _Fit:
    dtype = layer.weight.dtype
    if config.method != "armorfact":
        pruned = one_shot(config.method, weight, gram, config.pattern).to(dtype)
        core = Core.from_dense(pruned, Pattern.parse(config.pattern))
        loss = energy(weight.double() - pruned, gram) / (energy(weight, gram) or 1.0)
        return _Fit((core, None, None), loss, loss, 0, "pruned in one shot")
    result = factorize(
        weight.to(dtype),
        _given(gram, config),
        block=cast(tuple[int, int], layer.block),  # what no block fits stays dense
        pattern=config.pattern,
        init=config.init,
        normalize=_normalize(config),
        max_sweeps=config.sweeps,
        rtol=config.rtol,
    )
    scale = result.weight_loss or 1.0
    last = result.history[-1].number if result.loss < result.initial_loss else 0
    factors = (result.core, result.left, result.right)
    return _Fit(factors, result.loss / scale, result.initial_loss / scale, last, result.status)
