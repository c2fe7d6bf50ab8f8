"""What a layer loses by each method: the methods to compare with, and the loss they are compared by."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

import armorfact
from armorfact import Result, factorize
from armorfact_hf.layers.linear import FactorizedLinear
from armorfact_hf.model.structure import Layer
from armorfact_hf.pruning.config import PruneConfig

CONVERGED: dict[str, Any] = {"max_sweeps": 300, "rtol": 1e-4}  # the budget of the baseline "paper"


def one_shot(method: str, weight: Tensor, gram: Tensor, pattern: str) -> Tensor:
    """The weight pruned by one of the methods without wrappers, same dtype."""
    return getattr(armorfact, method)(weight, gram.float(), pattern=pattern)


def energy(residual: Tensor, gram: Tensor) -> float:
    """tr(R H R') in float64."""
    residual = residual.double()
    return max(float((residual @ gram.double()).mul_(residual).sum()), 0.0)


def layer_losses(
    target: Tensor, pruned: FactorizedLinear, gram: Tensor, config: PruneConfig, layer: Layer
) -> dict[str, float]:
    """The relative loss tr((W - W') H (W - W')') / tr(W H W') of the layer as pruned, and of the baselines.

    Args:
        target: W, (d_out, d_in). pruned: what replaces it. gram: H, (d_in, d_in).
        layer: without wrappers' blocks, the baseline "paper" is left out, as `left_out` says.
    """
    weights = {config.method: exact_weight(pruned)}
    for method in config.baselines:
        if method not in weights and not (method == "paper" and layer.block is None):
            weights[method] = _baseline(method, target, gram, config, layer)
    whole = energy(target, gram) or 1.0
    return {method: energy(target.double() - weight, gram) / whole for method, weight in weights.items()}


def left_out(config: PruneConfig, layer: Layer) -> list[str]:
    """A sentence for the report of a layer that a baseline does not fit."""
    if "paper" not in config.baselines or layer.block is not None:
        return []
    return [f"the baseline 'paper' is left out: {layer.unfit}"]


def exact_weight(pruned: FactorizedLinear) -> Tensor:
    """A C B in float64, so that nothing but the stored factors counts."""
    core = pruned.core.dense().double()
    if pruned.wrappers is None:
        return core
    left, right = (side.scaled(torch.float64) for side in pruned.wrappers)
    return armorfact.Factors(left, core, right).dense()


def _baseline(method: str, weight: Tensor, gram: Tensor, config: PruneConfig, layer: Layer) -> Tensor:
    if method != "paper":
        return one_shot(method, weight, gram, config.pattern)
    return paper(weight, gram, config.pattern, cast(tuple[int, int], layer.block)).dense()


def paper(weight: Tensor, gram: Tensor, pattern: str, block: tuple[int, int]) -> Result:
    """The ARMOR paper's objective solved to convergence: diag(H), NoWag-normalized W, from the NoWag-P mask."""
    return factorize(
        weight, gram.diagonal().float(), block=block, pattern=pattern, init="nowag", normalize="nowag", **CONVERGED
    )
