"""Which blocks fit a layer, and which layers can be pruned at all."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from armorfact import Pattern, auto_block
from armorfact.sizes import MAX_AUTO_BLOCK, fitting
from armorfact_hf.checkpoint.description import DTYPES
from armorfact_hf.layers.cuts import refusal_to_cut
from armorfact_hf.layers.format import LayerFormat, dtype_name
from armorfact_hf.model.causal_lm import CausalLM
from armorfact_hf.model.structure import DenseLayer, Layer, Select, chosen_layers
from armorfact_hf.pruning.config import AUTO, PRICED, PruneConfig

MOST_OVERHEAD = 1 / 8  # what "auto" lets the wrappers add to a layer, and "priced" to all of them
DTYPES_HELP = ", ".join(DTYPES)


def fitting_block(shape: tuple[int, int], config: PruneConfig) -> tuple[tuple[int, int] | None, str]:
    """The blocks (block_out, block_in) of wrappers around a layer; without any, None and the reason why.

    With "priced", those that prices start from. They fit the part of the layer that each of
    ``config.tensor_parallel`` ranks holds, whichever way it is cut.
    """
    pattern, ranks = Pattern.parse(config.pattern), config.tensor_parallel
    if reason := _odd_core(shape, config):
        return None, reason
    d_out, d_in = shape[0] // ranks, shape[1] // ranks
    of_rank = f", what one of {ranks} ranks holds of {shape[0]}x{shape[1]}" if ranks > 1 else ""
    if config.block in (AUTO, PRICED):
        block = auto_block((d_out, d_in), pattern, MOST_OVERHEAD * ranks)  # in shares of the whole layer
        return block, "" if block else f"no block of up to {MAX_AUTO_BLOCK} divides {d_out} and {d_in}{of_rank}"
    size, these = int(config.block), fitting(math.gcd(d_out, d_in), pattern.group)
    if d_out % size or d_in % size or size % pattern.group:
        return None, f"block {size} does not fit {d_out}x{d_in}{of_rank}; these do: {these or 'none'}"
    return (size, size), ""


def _odd_core(shape: tuple[int, int], config: PruneConfig) -> str:
    """Why no core of the pattern is of such a shape, or can be cut among the ranks; nothing if it can."""
    pattern = Pattern.parse(config.pattern)
    if shape[1] % pattern.group:
        return f"d_in = {shape[1]} is not a multiple of the pattern's group of {pattern.group}"
    return refusal_to_cut(LayerFormat("core", shape, pattern, None), config.tensor_parallel) or ""


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
        held, wanted = map(dtype_name, (found, dtype))
        return f"its weight is in {held}, the model in {wanted}; pruned layers share one of {DTYPES_HELP}"
    if config.method == "armorfact":
        return layer.unfit
    return _odd_core(layer.shape, config)  # without wrappers, nothing else has to fit


def fitting_layers(
    model: CausalLM, config: PruneConfig, select: Select | None = None
) -> tuple[list[Layer], list[DenseLayer]]:
    """The layers that will be pruned, with their blocks, and what stays dense with the reasons.

    Raises:
        ValueError: see `chosen_layers`; or no layer can be pruned, or experts not with these settings.
    """
    chosen, dense = chosen_layers(model, config.include, config.ignore, config.head, select)
    _refuse_experts(chosen, config)
    layers: list[Layer] = []
    for layer in (fitted(layer, config) for layer in chosen):
        if reason := reason_to_stay_dense(layer, config, model.dtype):
            dense.append(DenseLayer(layer.name, reason))
        else:
            layers.append(layer)
    layers = _whole_experts(layers, dense)
    if not layers:
        raise ValueError(f"no layer can be pruned with these settings; {dense[-1].name}: {dense[-1].reason}")
    return layers, dense


def _refuse_experts(layers: list[Layer], config: PruneConfig) -> None:
    stacks = [layer.stack for layer in layers if layer.stack]
    if stacks and config.wrapper_dtype is not None:
        raise ValueError(
            f"{stacks[0]} are experts, whose wrappers cannot be rounded to {config.wrapper_dtype}: leave them dense "
            "with ignore=('re:.*experts',), --ignore 're:.*experts' on the command line, or prune without wrapper_dtype"
        )


def _whole_experts(layers: list[Layer], dense: list[DenseLayer]) -> list[Layer]:
    """The layers, without experts of which some cannot be pruned; these are added to what stays dense."""
    reasons = {layer.name.rsplit(".", 2)[0]: layer for layer in reversed(dense)}
    kept = []
    for layer in layers:
        if layer.stack in reasons:
            first = reasons[layer.stack]
            dense.append(DenseLayer(layer.name, f"experts are pruned all together, and {first.name}: {first.reason}"))
        else:
            kept.append(layer)
    return kept
