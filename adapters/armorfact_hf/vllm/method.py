"""A linear layer of vLLM's that is pruned, or of whose fused parts some are."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase

from armorfact_hf.checkpoint.damage import AGAIN
from armorfact_hf.checkpoint.measured import use_measured_
from armorfact_hf.layers.format import LayerFormat
from armorfact_hf.layers.joined import JoinedLinears, refusal
from armorfact_hf.layers.parts import PARTS
from armorfact_hf.vllm.parts import Part
from armorfact_hf.vllm.ranks import shares
from armorfact_hf.vllm.routing import ignoring, part_number

FEW_AND_MANY = (1, 128)  # tokens: on either side of what any way to run a layer draws a line at
TENSORS = (*(part for part in PARTS if part != "bias"), "weight")  # under any module, but for the bias


class Placeholder(nn.Parameter):
    """An empty parameter, where vLLM looks for one of the name that a tensor of the checkpoint has.

    Some of vLLM's models put the rows of a weight into another order while they load it, along what a parameter says is
    its dimension of outputs. The factors know no such order.
    """

    layer_name: str
    weight_loader: Callable[..., None]

    @property
    def output_dim(self) -> int:
        """None that could be reordered.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            f"{self.layer_name}: vLLM's model reorders the rows of this layer while it loads them, which those of a "
            f"factorized weight cannot be: {ignoring(self.layer_name)}"
        )


class Source(NamedTuple):
    """A module of the checkpoint: its name, and how it is stored if it is pruned."""

    name: str
    layer: LayerFormat | None


class PrunedLinearMethod(LinearMethodBase):
    """Runs one layer as the modules that it is in the checkpoint, each a `FactorizedLinear` or dense.

    Args:
        prefix: name of the layer in vLLM's model. sources: what it consists of, in the order of its outputs.
        stored: the names of all tensors in the files.
        check_model: is called once all is loaded; raises ValueError if the model is not as it should be.
    """

    def __init__(
        self, prefix: str, sources: list[Source], stored: Collection[str], check_model: Callable[[], None]
    ) -> None:
        self.prefix, self.sources, self.stored, self.check_model = prefix, sources, stored, check_model
        self.parts: list[Part] = []

    def create_weights(self, layer: LinearBase, *sizes: Any, params_dtype: torch.dtype, **_: Any) -> None:
        """Make the parts, of this rank's sizes, and placeholders that lead what is loaded to them.

        Raises:
            ValueError: this rank cannot hold its share of a part.
        """
        found = zip(self.sources, shares(layer, len(self.sources)), strict=True)
        self.parts = [Part(source.name, share, params_dtype, source.layer) for source, share in found]
        for name in TENSORS:
            empty = torch.empty(0, dtype=torch.uint8 if name == "positions" else params_dtype)
            placeholder = Placeholder(empty, requires_grad=False)
            placeholder.layer_name = self.prefix
            placeholder.weight_loader = partial(self._load, name)
            layer.register_parameter(name, placeholder)

    def _load(self, name: str, _: nn.Parameter, tensor: Tensor, shard: object = None) -> None:
        self.parts[part_number(shard, len(self.parts), self.prefix)].load(name, tensor)

    def process_weights_after_loading(self, layer: LinearBase) -> None:
        """Once all is loaded: see that all came, and choose how it runs here; what that takes is prepared now.

        Raises:
            ValueError: a tensor is missing, or a bias that the model has no place for is there.
        """
        self.check_model()
        for part in self.parts:
            self._check_complete(part, layer)
        for name in TENSORS:
            delattr(layer, name)
        modules = [part.module for part in self.parts]
        layer.parts = nn.ModuleList(modules) if refusal(modules) else JoinedLinears(modules)
        use_measured_(layer.parts, Path(get_current_vllm_config().model_config.model))
        self._warm(layer)

    @torch.inference_mode()
    def _warm(self, layer: LinearBase) -> None:
        """Compute once, of few tokens and of many, so that no request waits for kernels to be compiled."""
        weight = next(layer.parts.parameters())  # the first floating tensor: whole numbers are no parameters
        for tokens in FEW_AND_MANY:
            self.apply(
                layer, torch.zeros(tokens, self.parts[0].share.shape[1], dtype=weight.dtype, device=weight.device)
            )

    def _check_complete(self, part: Part, layer: LinearBase) -> None:
        if missing := sorted(f"{part.name}.{name}" for name in part.missing):
            raise ValueError(f"the files lack {', '.join(missing)}, which {self.prefix} needs: {AGAIN}")
        bias = f"{part.name}.bias"
        if (bias in self.stored) != (layer.bias is not None):
            does, has = ("hold", "no") if layer.bias is None else ("lack", "a")
            raise ValueError(f"the files {does} {bias}, and {self.prefix} of vLLM's model has {has} bias: {AGAIN}")

    def apply(self, layer: LinearBase, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """y (..., outputs of this rank) for x (..., inputs of this rank)."""
        if isinstance(layer.parts, JoinedLinears):
            y = layer.parts(x)
        else:
            y = torch.cat([part(x) for part in layer.parts], dim=-1)
        return y if bias is None else y + bias
