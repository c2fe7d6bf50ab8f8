"""Tiny pruned models that are far from their dense ones, and a teacher for each."""

from __future__ import annotations

import torch
from torch import nn

from armorfact_hf.layers.linear import FactorizedLinear
from armorfact_hf.pruning.config import PruneConfig
from armorfact_hf.pruning.prune import prune_
from tests.hf.models import random_tokens, tiny_model

# With weights of this size what the model says depends on what it reads.
WIDE = {
    "gpt2": {"initializer_range": 0.1},
    "opt": {"init_std": 0.1},
    "gemma3": {"initializer_range": 0.1, "final_logit_softcapping": 5.0},
}


def dense_model(family: str = "gpt2", dtype: torch.dtype = torch.float32) -> nn.Module:
    return tiny_model(family, dtype=dtype, **WIDE.get(family, {"initializer_range": 0.1}))


@torch.no_grad()
def pruned_model(family: str = "gpt2", dtype: torch.dtype = torch.float32, **settings) -> nn.Module:
    """Every layer is made too small as well: an error of which training on a few random tokens mends a part."""
    model = dense_model(family, dtype)
    quick = {} if "method" in settings else {"sweeps": 1, "block": 8, "refine": None}
    prune_(model, random_tokens(), PruneConfig(**{"baselines": ()} | quick | settings))
    for layer in pruned_layers(model).values():
        layer.values.mul_(0.75)
    return model


def pruned_layers(model: nn.Module) -> dict[str, FactorizedLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, FactorizedLinear)}
