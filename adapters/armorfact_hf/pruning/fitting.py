"""Which blocks fit a layer, and which layers can be pruned at all."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from armorfact import Pattern, auto_block
from armorfact.sizes import MAX_AUTO_BLOCK, fitting
from armorfact_hf.checkpoint.description import DTYPES
from armorfact_hf.model.causal_lm import CausalLM
from armorfact_hf.model.structure import DenseLayer, Layer, Select, chosen_layers
from armorfact_hf.pruning.config import PruneConfig

MOST_OVERHEAD = 1 / 8  # what "auto" lets the wrappers add to a layer
DTYPES_HELP = ", ".join(DTYPES)


def fitting_block(shape: tuple[int, int], config: PruneConfig) -> tuple[tuple[int, int] | None, str]:
    """The blocks (block_out, block_in) of wrappers around a layer; without any, None and the reason why."""
    d_out, d_in = shape
    pattern = Pattern.parse(config.pattern)
    if reason := _odd_width(d_in, pattern):
        return None, reason
    if config.block == "auto":
        block = auto_block(shape, pattern, MOST_OVERHEAD)
        return block, "" if block else f"no block of up to {MAX_AUTO_BLOCK} divides {d_out} and {d_in}"
    size, these = int(config.block), fitting(math.gcd(d_out, d_in), pattern.group)
    if d_out % size or d_in % size or size % pattern.group:
        return None, f"block {size} does not fit {d_out}x{d_in}; these do: {these or 'none'}"
    return (size, size), ""


def _odd_width(d_in: int, pattern: Pattern) -> str:
    """Why no core of the pattern is so wide, or nothing."""
    return f"d_in = {d_in} is not a multiple of the pattern's group of {pattern.group}" if d_in % pattern.group else ""


def fitted(layer: Layer, config: PruneConfig) -> Layer:
    """The layer with the blocks that it gets, or the reason why there are none."""
    block, reason = fitting_block(layer.shape, config)
    return replace(layer, block=block, unfit=reason)


def reason_to_stay_dense(layer: Layer, config: PruneConfig, dtype: torch.dtype) -> str:
    """Why a fitted layer cannot be pruned, or nothing.

    Args:
        dtype: of the model. A checkpoint has one, so a layer in another would be loaded with other numbers.
    """
    found = layer.weight.dtype
    if found != dtype or found not in DTYPES.values():
        return f"its weight is in {_name(found)}, the model in {_name(dtype)}; pruned layers share one of {DTYPES_HELP}"
    if config.method == "armorfact":
        return layer.unfit
    return _odd_width(layer.shape[1], Pattern.parse(config.pattern))  # without wrappers, nothing else has to fit


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def fitting_layers(
    model: CausalLM, config: PruneConfig, select: Select | None = None
) -> tuple[list[Layer], list[DenseLayer]]:
    """The layers that will be pruned, with their blocks, and what stays dense with the reasons.

    Raises:
        ValueError: see `chosen_layers`; or no layer can be pruned.
    """
    chosen, dense = chosen_layers(model, config.include, config.ignore, config.head, select)
    layers = []
    for layer in (fitted(layer, config) for layer in chosen):
        if reason := reason_to_stay_dense(layer, config, model.dtype):
            dense.append(DenseLayer(layer.name, reason))
        else:
            layers.append(layer)
    if not layers:
        raise ValueError(f"no layer can be pruned with these settings; {dense[-1].name}: {dense[-1].reason}")
    return layers, dense
