"""The stored factors themselves, opened for any trainer."""

from __future__ import annotations

from torch import nn

from armorfact_hf.layers.linear import FactorizedLinear
from armorfact_hf.layers.stack import pruned_modules
from armorfact_hf.model.causal_lm import CausalLM
from armorfact_hf.recovery.settings import TRAINED


def train_factors_(model: CausalLM, train: str = "factors") -> CausalLM:
    """Let the factors of a pruned model's layers ask for gradients, and nothing else; then Trainer takes it.

    The positions of the kept values are no parameters: whatever a trainer does, at most N of M stay non-zero. A small
    step is lost in 16 bits, so load the model in float32 to train it, and cast it before it is saved.

    Args:
        model: pruned; changed in place. A choice of `FactorizedLinear.use_` ends, since it may keep a copy of the
            weight that training would leave behind.
        train: "factors" for A, B and the kept values of C; "wrappers" for A and B alone.

    Raises:
        ValueError: an unknown choice, a model without pruned layers, or without any of the factors; "factors" of a
            model whose cores are int8, either of one whose wrappers are.
    """
    if train not in TRAINED:
        raise ValueError(f"train must be one of {', '.join(TRAINED)}, got {train!r}")
    refuse_integers(model, train)
    layers = pruned_modules(model).values()
    factors = [tensor for layer in layers for part in TRAINED[train] if (tensor := getattr(layer, part)) is not None]
    if not factors:
        raise ValueError(
            f"the model has no {'wrappers' if layers else 'pruned layers'} to train: load a folder that "
            "`armorfact prune` wrote with wrappers"
        )
    model.requires_grad_(False)
    for layer in layers:
        if isinstance(layer, FactorizedLinear):
            layer.use_(None)
    for factor in factors:
        factor.requires_grad_(True)
    if (loader := getattr(model, "hf_quantizer", None)) is not None:  # transformers asks it whether a model is trained
        loader.trains_factors = True
    return model


def refuse_integers(model: nn.Module, train: str) -> None:
    """Raise ValueError if kept values or wrappers are to be trained that are integers."""
    for name, module in pruned_modules(model).items():
        if module.layout.wrapper_dtype is not None:
            raise ValueError(
                f"the wrappers of {name} are {module.layout.wrapper_dtype}, which cannot be trained: train a folder "
                "that was pruned without --wrapper-dtype"
            )
        if "values" in TRAINED[train] and module.layout.core_dtype is not None:
            raise ValueError(
                f"the core of {name} is {module.layout.core_dtype}, which cannot be trained: take train='wrappers' "
                "(--train wrappers), or train a folder that was pruned without --core-dtype"
            )
