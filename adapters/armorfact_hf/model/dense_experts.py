"""The dense experts that pruned ones stand for."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from armorfact_hf.layers.experts import FactorizedExperts
from armorfact_hf.layers.stack import FactorizedStack
from armorfact_hf.model.experts import StackedExperts


@torch.no_grad()
def dense_experts(pruned: FactorizedExperts) -> nn.Module:
    """The experts of the dense model, with the weights A C B and the biases of pruned ones."""
    module, stacks = copy.copy(pruned.gating.module), pruned.stacks
    module._parameters = {}
    first = "gate_up_proj" if module.has_gate else "up_proj"
    _register_empty(module, first, [stack for name, stack in stacks.items() if name != "down"])
    _register_empty(module, "down_proj", [stacks["down"]])
    stacked = StackedExperts(module)
    for projection, stack in stacks.items():
        for expert, (factors, bias) in enumerate(stack.each):
            stacked.weight(expert, projection).copy_(factors.dense())
            place = stacked.bias(expert, projection)
            if place is not None and bias is not None:
                place.copy_(bias)
    return module


def _register_empty(module: Any, name: str, stacks: Sequence[FactorizedStack]) -> None:
    """A parameter for the weights of some projections, one below the other, and one for their biases."""
    held, dtype, experts = stacks[0].values, stacks[0].dtype, len(stacks[0].values)
    d_out, d_in = sum(stack.layout.shape[0] for stack in stacks), stacks[0].layout.shape[1]
    sizes = (d_in, d_out) if module.is_transposed else (d_out, d_in)
    module.register_parameter(name, nn.Parameter(held.new_empty(experts, *sizes, dtype=dtype), requires_grad=False))
    if module.has_bias:
        bias = nn.Parameter(held.new_empty(experts, d_out, dtype=dtype), requires_grad=False)
        module.register_parameter(f"{name}_bias", bias)
