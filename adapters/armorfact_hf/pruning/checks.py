"""What a model and calibration tokens have to be, so that a run does not find out in its middle."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from armorfact_hf.layers.linear import FactorizedLinear
from armorfact_hf.model.causal_lm import CausalLM


def refuse_pruned(model: nn.Module) -> None:
    """Raise ValueError if the model holds pruned layers already."""
    for name, module in model.named_modules():
        if isinstance(module, FactorizedLinear):
            raise ValueError(f"the model is pruned already ({name}); load the dense model again")


def checked_tokens(model: CausalLM, calibration: Any) -> Tensor:
    """Calibration tokens as an int64 tensor (windows, length).

    Raises:
        ValueError: not a non-empty integer matrix, or numbers outside of the vocabulary.
    """
    tokens = torch.as_tensor(calibration)
    if tokens.ndim != 2 or 0 in tokens.shape or tokens.is_floating_point():
        raise ValueError(
            f"calibration must be a (windows, length) matrix of token numbers, got shape {tuple(tokens.shape)} of "
            f"{tokens.dtype}; armorfact_hf.windows cuts a text's tokens into one"
        )
    vocabulary = model.get_input_embeddings().num_embeddings
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= vocabulary:
        raise ValueError(
            f"calibration holds token numbers from {low} to {high}, the model's vocabulary has {vocabulary}: "
            "were they made by this model's own tokenizer?"
        )
    return tokens.to(torch.int64)
