"""Turn a pruned model into an ordinary dense one."""

from __future__ import annotations

import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from armorfact_hf.layers.experts import FactorizedExperts
from armorfact_hf.layers.linear import FactorizedLinear
from armorfact_hf.model.causal_lm import CausalLM
from armorfact_hf.model.conversions import conversions_of_dense
from armorfact_hf.model.dense_experts import dense_experts


def to_dense_(model: CausalLM) -> CausalLM:
    """Replace every pruned layer by an ordinary one with the weight A C B, in place; any tool can use the result.

    Raises:
        ValueError: adapters are around pruned layers.
    """
    pruned = {name: x for name, x in model.named_modules() if isinstance(x, FactorizedLinear | FactorizedExperts)}
    with torch.device("meta"):
        dense = dict(AutoModelForCausalLM.from_config(model.config, dtype=model.dtype).named_modules())
    if wrapped := [name for name in pruned if name not in dense]:
        raise ValueError(
            f"{wrapped[0]} is inside of an adapter: take it out first, with `unload()` of the PEFT model, or load the "
            "folder anew"
        )
    for name, layer in pruned.items():
        like = dense[name]
        model.set_submodule(
            name, dense_experts(layer) if isinstance(layer, FactorizedExperts) else _dense_linear(like, layer)
        )
    conversions = conversions_of_dense(model)
    if hasattr(model, "hf_quantizer"):
        model.hf_quantizer.remove_quantization_config(model)  # and the model's own conversions
    model._weight_conversions = conversions
    return model


def _dense_linear(like: nn.Module, layer: FactorizedLinear) -> nn.Module:
    """The layer ``like`` of an empty dense model, with the weight and bias of a pruned one."""
    weight = layer.weight
    weight = weight.T.contiguous() if isinstance(like, Conv1D) else weight
    like.weight = nn.Parameter(weight, requires_grad=False)
    if layer.bias is not None:
        like.bias = nn.Parameter(layer.bias.detach().clone(), requires_grad=False)
    return like
