"""What a model and calibration tokens have to be, so that a run does not find out in its middle."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from armorfact_hf.layers.stack import pruned_modules
from armorfact_hf.model.causal_lm import CausalLM

MATRIX = "calibration must be a (windows, length) matrix of token numbers"
CUT = "armorfact_hf.windows cuts a text's tokens into one"
STATES = ("auto", "memory", "disk")
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def refuse_pruned(model: nn.Module) -> None:
    """Raise ValueError if the model holds pruned layers already."""
    for name in pruned_modules(model):
        raise ValueError(f"the model is pruned already ({name}); load the dense model again")


def check_states(states: str) -> None:
    """Raise ValueError if there is no such place for states."""
    if states not in STATES:
        raise ValueError(f"states must be one of {', '.join(STATES)}, got {states!r}")


def check_experts(at_once: int | None) -> None:
    """Raise ValueError if that is no number of experts."""
    if at_once is not None and (type(at_once) is not int or at_once < 1):
        raise ValueError(f"experts_at_once must be 1 or more, or None to go by memory, got {at_once!r}")


def check_model(model: CausalLM, on_disk: bool = False) -> None:
    """Whether a model can be pruned at all, by what it is and by what its weights hold.

    Args:
        on_disk: weights may be on the meta device; they are looked at when they are read for the first time.

    Raises:
        ValueError: it is pruned already, no decoder-only language model, without numbers, or with NaN or infinite ones.
    """
    refuse_pruned(model)
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    two_parts = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    if two_parts or not isinstance(getattr(embedding, "num_embeddings", None), int):
        raise ValueError(
            f"expected a decoder-only causal language model such as AutoModelForCausalLM loads, got a "
            f"{type(model).__name__}"
        )
    for name, parameter in () if on_disk else model.named_parameters():
        if parameter.is_meta:
            raise ValueError(f"{name} holds no numbers (it is on the meta device): load the model into memory first")
        if parameter.is_floating_point() and not torch.isfinite(parameter).all():
            raise ValueError(f"{name} holds NaN or infinite values: copy or download the model again")


def checked_tokens(model: CausalLM, calibration: Any) -> Tensor:
    """Calibration tokens as an int64 tensor (windows, length).

    Raises:
        ValueError: not a non-empty integer matrix, longer windows than the model takes, or numbers outside of the
            vocabulary.
    """
    tokens = _matrix(calibration)
    most = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if most is not None and tokens.shape[1] > most:
        raise ValueError(
            f"calibration has windows of {tokens.shape[1]} tokens, and the model is made for at most {most}: cut "
            "shorter ones, as armorfact_hf.windows does"
        )
    vocabulary = model.get_input_embeddings().num_embeddings
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= vocabulary:
        raise ValueError(
            f"calibration holds token numbers from {low} to {high}, the model's vocabulary has {vocabulary}: "
            "were they made by this model's own tokenizer?"
        )
    return tokens


def _matrix(calibration: Any) -> Tensor:
    try:
        tokens = torch.as_tensor(calibration)
    except (ValueError, TypeError, RuntimeError) as error:
        raise ValueError(f"{MATRIX}, got {type(calibration).__name__}: {error}; {CUT}") from error
    if tokens.ndim != 2 or 0 in tokens.shape or tokens.dtype not in INTEGERS:
        raise ValueError(f"{MATRIX}, got shape {tuple(tokens.shape)} of {tokens.dtype}; {CUT}")
    return tokens.to(torch.int64)
