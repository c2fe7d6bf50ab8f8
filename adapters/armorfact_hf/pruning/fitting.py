"""Which blocks fit a layer, and which layers can be pruned at all."""

from __future__ import annotations

from torch import nn

from armorfact import Pattern
from armorfact_hf.model.structure import DenseLayer, Layer, Select, chosen_layers
from armorfact_hf.pruning.config import PruneConfig

LARGEST_BLOCK = 128
MOST_OVERHEAD = 1 / 8  # what "auto" lets the wrappers add to a layer


def fitting_block(shape: tuple[int, int], config: PruneConfig) -> tuple[tuple[int, int] | None, str]:
    """The blocks (block_out, block_in) that a layer gets; without any, None and the reason why."""
    d_out, d_in = shape
    group = Pattern.parse(config.pattern).group
    if d_in % group:
        return None, f"d_in = {d_in} is not a multiple of the pattern's group of {group}"
    if config.method != "armorfact":
        return (1, group), ""
    fitting = [b for b in range(group, LARGEST_BLOCK + 1, group) if d_out % b == 0 and d_in % b == 0]
    if config.block == "auto":
        light = [b for b in fitting if b / d_in + b / d_out <= MOST_OVERHEAD]
        if not fitting:
            return None, f"no block of up to {LARGEST_BLOCK} divides {d_out} and {d_in}"
        size = max(light, default=fitting[0])
    else:
        size = int(config.block)
        if d_out % size or d_in % size or size % group:
            return None, f"block {size} does not fit {d_out}x{d_in}; these do: {fitting or 'none'}"
    return (size, size), ""


def fitting_layers(
    model: nn.Module, config: PruneConfig, select: Select | None = None
) -> tuple[list[Layer], list[DenseLayer]]:
    """The layers that will be pruned, and what stays dense with the reasons.

    Raises:
        ValueError: see `chosen_layers`; or no block fits any layer.
    """
    chosen, dense = chosen_layers(model, config.include, config.ignore, config.head, select)
    layers = []
    for layer in chosen:
        block, reason = fitting_block(layer.shape, config)
        if block is None:
            dense.append(DenseLayer(layer.name, reason))
        else:
            layers.append(layer)
    if not layers:
        raise ValueError(f"no layer can be pruned with these settings; {dense[-1].name}: {dense[-1].reason}")
    return layers, dense
