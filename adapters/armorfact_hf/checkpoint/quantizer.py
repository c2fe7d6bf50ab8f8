"""What transformers calls to load and save pruned models: `AutoModelForCausalLM.from_pretrained` needs no more.

Importing this module registers both classes; `armorfact_hf` imports it as soon as transformers is in use.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from armorfact_hf.checkpoint.config_file import CONFIG, read_config
from armorfact_hf.checkpoint.description import QUANT_METHOD, Description, digests
from armorfact_hf.checkpoint.measured import use_measured_
from armorfact_hf.checkpoint.verify import verify
from armorfact_hf.layers.experts import FactorizedExperts
from armorfact_hf.layers.format import LayerFormat, dtype_name
from armorfact_hf.layers.linear import FactorizedLinear
from armorfact_hf.layers.routed import Gating
from armorfact_hf.layers.stack import FactorizedStack
from armorfact_hf.model.causal_lm import CausalLM
from armorfact_hf.model.conversions import conversions_without
from armorfact_hf.model.experts import StackedExperts
from armorfact_hf.model.structure import Layer, is_linear


@register_quantization_config(QUANT_METHOD)
class ArmorfactConfig(QuantizationConfigMixin):
    """The ``quantization_config`` of a pruned model, checked at once.

    Args:
        found: the entries of the JSON object, see docs/format.md.

    Raises:
        ValueError: malformed, or of another version of the format; the message names the entry.
    """

    def __init__(self, **found: Any) -> None:
        self.quant_method: Any = QUANT_METHOD  # transformers lists its own methods only
        self.description = Description.from_dict(found, "config.json")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return self.description.to_dict()


@register_quantizer(QUANT_METHOD)
class ArmorfactQuantizer(HfQuantizer):
    """Puts a `FactorizedLinear` in the place of every pruned layer, after the files were found whole."""

    requires_calibration = True
    trains_factors = stored_as_named = False
    quantization_config: ArmorfactConfig

    def is_serializable(self) -> bool:
        """A pruned model is saved as it is loaded."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Gradients pass through the layers: to adapters, and to the factors themselves."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """Whether `train_factors_` opened the factors; else a trainer without adapters would find nothing to train."""
        return self.trains_factors

    @property
    def is_compileable(self) -> bool:
        """`torch.compile` takes every layer as one step."""
        return True

    def _process_model_before_weight_loading(
        self, model: CausalLM, checkpoint_files: Sequence[str] | None = None, dtype: Any = None, **_: Any
    ) -> nn.Module:
        description, shapes = self.quantization_config.description, {}
        if checkpoint_files:
            if (config := Path(checkpoint_files[0]).parent / CONFIG).is_file():
                read_config(config)  # refuses what transformers reads past, such as a key that is there twice
            with torch.device("cpu"):  # transformers builds the model on the meta device, which holds no numbers
                shapes = verify([Path(name) for name in checkpoint_files], description).shapes
        put_layers_(model, description.modules.values(), dtype)
        _check_shapes(model, shapes)
        self.stored_as_named = bool(shapes) and set(shapes) <= set(model.state_dict())
        return model

    def _process_model_after_weight_loading(self, model: CausalLM, **_: Any) -> nn.Module:
        for name in self.quantization_config.description.modules:
            model.get_submodule(name).requires_grad_(False)  # transformers asks gradients of all that it loads
        return use_measured_(model, Path(model.name_or_path))

    def update_weight_conversions(self, weight_conversions: list, *_: Any) -> list:  # the model, since 5.20
        """None for files that hold every tensor under the name that it has in the model, see `attach_`."""
        return [] if self.stored_as_named else weight_conversions

    def get_state_dict_and_metadata(self, model: CausalLM) -> tuple[None, dict[str, str]]:
        """Nothing of its own: transformers writes its state dict, but first `config.json`, so put the digests there.

        Not into the metadata of the files: safetensors writes that in random order, and saving a model twice is to
        give the same bytes.
        """
        tensors = model.state_dict()
        offloaded = any(tensor.is_meta for tensor in tensors.values())  # to disk, whence transformers fetches them
        put_digests_(model, {} if offloaded else digests(tensors))
        return None, {}

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        from armorfact_hf.checkpoint.dense import to_dense_  # imports transformers' models, which import this module

        return to_dense_(model).to(dtype)


def _check_shapes(model: nn.Module, stored: Mapping[str, tuple[int, ...]]) -> None:
    """Before transformers makes room for them: a config may ask for more than there is."""
    for name, tensor in model.state_dict().items():
        if name in stored and tuple(tensor.shape) != stored[name]:
            raise ValueError(
                f"tensor {name} has the shape {list(stored[name])}, and config.json asks for {list(tensor.shape)}: "
                "copy or download the folder again"
            )


def put_digests_(model: CausalLM, sha256: dict[str, str]) -> None:
    """Write into a pruned model's config the digests of its tensors, and its dtype as it is now."""
    config = model.hf_quantizer.quantization_config
    dtype = dtype_name(model.dtype)
    config.description = dataclasses.replace(config.description, dtype=dtype, sha256=sha256)
    model.config.quantization_config = config


def put_layers_(model: nn.Module, layers: Iterable[LayerFormat], dtype: torch.dtype | None) -> None:
    """Replace linear layers, and experts, by empty pruned ones, on the device of the model.

    Raises:
        ValueError: the model has no such layers or experts.
    """
    experts: dict[str, dict[str, LayerFormat]] = {}
    for layer in layers:
        if layer.experts is None:
            put_layer_(model, layer, dtype)
        else:
            owner, projection = layer.name.rpartition(".")[::2]
            experts.setdefault(owner, {})[projection] = layer
    for owner, stacks in experts.items():
        put_experts_(model, owner, stacks, dtype)


def put_layer_(model: nn.Module, layer: LayerFormat, dtype: torch.dtype | None) -> None:
    """Replace a linear layer by an empty pruned one, on the device of the model.

    Raises:
        ValueError: the model has no linear layer of that name and shape.
    """
    try:
        module = model.get_submodule(layer.name)
    except AttributeError:
        module = None
    if module is None or not is_linear(module):
        raise ValueError(f"config.json lists {layer.name} as pruned; the model has no linear layer of that name")
    if (shape := Layer(layer.name, module, None).shape) != layer.shape:
        raise ValueError(
            f"config.json gives {layer.name} the shape {list(layer.shape)}; in the model it has {list(shape)}"
        )
    bias = module.bias is not None
    model.set_submodule(layer.name, FactorizedLinear.empty(layer, bias, dtype, module.weight.device))


def put_experts_(
    model: nn.Module, name: str, layers: Mapping[str, LayerFormat], dtype: torch.dtype | None = None
) -> None:
    """Replace stacked experts by empty pruned ones, on the device of the model.

    Args:
        name: of the experts. layers: the stacks that take the place of their weights, by projection.

    Raises:
        ValueError: the model has no experts of that name, or of other sizes.
    """
    try:
        stacked = StackedExperts.of(model.get_submodule(name))
    except AttributeError:
        stacked = None
    if stacked is None or stacked.refusal:
        raise ValueError(f"config.json lists the experts {name} as pruned; the model has no such experts there")
    if set(layers) != set(stacked.projections):
        raise ValueError(f"config.json lists {', '.join(layers)} of {name}, expected {', '.join(stacked.projections)}")
    for projection, layer in layers.items():
        sizes = (stacked.count, *stacked.weight(0, projection).shape)
        if (layer.experts, *layer.shape) != sizes:
            raise ValueError(
                f"config.json gives {layer.name} the shape {[layer.experts, *layer.shape]}, experts first; in the "
                f"model it has {list(sizes)}"
            )
    device, bias = stacked.weight(0, "down").device, stacked.module.has_bias
    stacks = {projection: FactorizedStack(layer, bias, dtype, device) for projection, layer in layers.items()}
    model.set_submodule(name, FactorizedExperts(stacks, Gating(stacked.module)))


def attach_(model: CausalLM, description: Description) -> None:
    """Tell a model pruned in memory what it is, so that transformers saves it as one.

    Some families transformers saves under other names than they have in the model, and experts one by one. A
    description goes by the names in the model, so whatever would change those of pruned layers is left out; with
    experts, all of it.
    """
    names = [f"{name}.values" for name in description.modules]
    kept = [] if description.has_experts else conversions_without(model, names)
    if kept is not None:
        model._weight_conversions = kept
    config = ArmorfactConfig(**description.to_dict())
    model.config.quantization_config = config
    model.hf_quantizer = ArmorfactQuantizer(config)
    model.quantization_method, model.is_quantized = QUANT_METHOD, True
