"""What vLLM asks of a way to store weights: which of its layers are pruned, and who runs those."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from vllm.config import get_current_vllm_config
from vllm.distributed import get_pp_group, get_tensor_model_parallel_rank
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase

from armorfact_hf.checkpoint.description import QUANT_METHOD as QUANT_METHOD
from armorfact_hf.checkpoint.description import Description
from armorfact_hf.layers.format import LayerFormat
from armorfact_hf.vllm.files import stored_names
from armorfact_hf.vllm.method import PrunedLinearMethod, Source
from armorfact_hf.vllm.routing import part_names, refusal

READ_BY_VLLM = ("kv_b_proj",)  # of multi-head latent attention, which cuts the weight in two and absorbs the halves


class ArmorfactQuantization(QuantizationConfig):
    """The ``quantization_config`` of a pruned model, as vLLM wants it.

    vLLM pickles it into each of its processes: until a model is built it holds the JSON object only.

    Args:
        found: that object, see docs/format.md.
    """

    def __init__(self, found: dict[str, Any]) -> None:
        super().__init__()
        self.found = found
        self.claimed: set[str] = set()

    @classmethod
    def get_name(cls) -> Any:
        """As ``quant_method`` says."""
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """What pruned layers can be computed in."""
        return [torch.float32, torch.bfloat16, torch.float16]

    @classmethod
    def get_min_capability(cls) -> int:
        """Of a GPU: any, since each way to run a layer says for itself what it needs."""
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        """None beside config.json."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> ArmorfactQuantization:
        """From the JSON object."""
        return cls(config)

    @cached_property
    def formats(self) -> dict[str, LayerFormat]:
        """The pruned modules by the name that vLLM's model has for them; each holds its name in the checkpoint."""
        return Description.from_dict(self.found, "config.json").modules

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Rename modules as the model does."""
        self.formats = hf_to_vllm_mapper.apply_dict(self.formats)

    @cached_property
    def stored(self) -> frozenset[str]:
        """The names of all tensors in the files; these are verified the first time that a rank asks.

        Raises:
            ValueError: damaged files, or adapters are to be served.
        """
        config, first = get_current_vllm_config(), get_pp_group().is_first_rank
        if config.lora_config is not None:
            raise ValueError(
                "vLLM puts adapters around weights, which pruned layers do not have: serve without --enable-lora, or "
                "merge the adapter into the dense weights of `armorfact export`"
            )
        model = config.model_config
        return stored_names(model.model, model.revision, whole=first and get_tensor_model_parallel_rank() == 0)

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """Who runs the layer of that name: a `PrunedLinearMethod` if any of its parts is pruned.

        Raises:
            ValueError: damaged files, or a pruned layer whose weight vLLM reads in a way of its own.
        """
        names, stored = self._parts(layer, prefix.strip(".")), self.stored
        pruned = [name for name in names if name in self.formats]
        linear = isinstance(layer, LinearBase)
        if pruned and (not linear or prefix.endswith(READ_BY_VLLM)):
            raise ValueError(refusal(self.formats[pruned[0]].name, type(layer).__name__))
        if not pruned:
            return UnquantizedLinearMethod() if linear else None
        self.claimed.update(pruned)
        stem = self.formats[pruned[0]].name.rpartition(".")[0]  # parts of a layer are beside each other
        sources = [Source(f"{stem}.{name.rpartition('.')[2]}", self.formats.get(name)) for name in names]
        return PrunedLinearMethod(prefix, sources, stored, self.check_claimed)

    def _parts(self, layer: torch.nn.Module, prefix: str) -> list[str]:
        if isinstance(layer, RoutedExperts):
            return [name for name in self.formats if name.startswith(f"{prefix}.")]
        if not isinstance(layer, LinearBase):
            return [prefix]
        return part_names(prefix, self.packed_modules_mapping, self.formats)

    def check_claimed(self) -> None:
        """Whether every pruned module became one of the model's layers, where this rank has the whole model.

        Raises:
            ValueError: one did not.
        """
        left_over = [layer.name for name, layer in self.formats.items() if name not in self.claimed]
        if left_over and get_pp_group().world_size == 1:
            raise ValueError(refusal(left_over[0], "no linear layer of that name"))
