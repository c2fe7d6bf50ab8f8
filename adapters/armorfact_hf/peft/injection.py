"""Makes PEFT's LoRA know pruned layers: importing this module changes methods of `LoraModel`, once.

PEFT has a registration for layers of other packages, but on one `LoraConfig`; those that it reads from a saved adapter
are made where nobody can register anything. So it is done as an adapter is put into a model, for models that hold
pruned layers only.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from inspect import signature
from typing import Any

from peft.tuners.lora import LoraConfig, LoraModel  # not from peft itself, which is being imported at this moment
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from armorfact_hf.layers.linear import FactorizedLinear
from armorfact_hf.peft.lora import FactorizedLora

EVERYTHING = "all-linear"
LINEAR = (nn.Linear, Conv1D, FactorizedLinear)

_inject = LoraModel.inject_adapter


@wraps(_inject)
def _inject_adapter(self: LoraModel, model: nn.Module, adapter_name: str, *given: Any, **more: Any) -> None:
    if any(isinstance(module, FactorizedLinear) for module in model.modules()):
        _prepare(self.peft_config[adapter_name], model)
    _inject(self, model, adapter_name, *given, **more)


def _prepare(config: LoraConfig, model: nn.Module) -> None:
    if names := getattr(config, "target_parameters", None):
        raise ValueError(
            f"the model holds pruned layers: target_parameters={list(names)} is not supported there, whose factors are "
            "no weights to add to; name their layers in target_modules"
        )
    config._register_custom_module({FactorizedLinear: FactorizedLora})
    wanted = config.target_modules
    if isinstance(wanted, str) and wanted.lower() == EVERYTHING:  # which PEFT takes for torch's own linear layers
        config.target_modules = linear_names(model)


def linear_names(model: nn.Module) -> set[str]:
    """What "all-linear" means in a model that holds pruned layers: all linear ones but the output head."""
    tuned = {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    inside = tuple(f"{name}." for name in tuned)
    held = {name: module for name, module in model.named_modules() if not name.startswith(inside)}
    held |= {name: layer.get_base_layer() for name, layer in tuned.items()}
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return {name for name, module in held.items() if isinstance(module, LINEAR) and module is not head}


def _refusing_first(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method that merges adapters, which asks the pruned layers before it changes the first of the others."""
    parameters = signature(method)

    @wraps(method)
    def merging(self: LoraModel, *given: Any, **more: Any) -> Any:
        asked = parameters.bind(self, *given, **more).arguments
        if asked.get("merge", True):
            for module in self.model.modules():
                if isinstance(module, FactorizedLora):
                    module.merge(adapter_names=asked.get("adapter_names"))
        return method(self, *given, **more)

    return merging


LoraModel.inject_adapter = _inject_adapter
LoraModel.merge_adapter = _refusing_first(LoraModel.merge_adapter)
LoraModel._unload_and_optionally_merge = _refusing_first(LoraModel._unload_and_optionally_merge)
