"""`FactorizedStack`: one linear layer of each expert, their factors stacked."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from armorfact import Pattern
from armorfact_hf.layers import operators as operators  # registers what `FactorizedStack.product` calls
from armorfact_hf.layers.format import LayerFormat
from armorfact_hf.layers.linear import FactorizedLinear
from armorfact_hf.layers.parts import PARTS, StoredParts, in_forward_mode, is_cast, put_empty_
from armorfact_hf.layers.strategies import packed_experts, plain
from armorfact_hf.layers.strategies.strategy import Kind, Operands


class FactorizedStack(StoredParts):
    """Linear layers of one shape, one for each expert, each stored as A C B; see `FactorizedLinear`.

    Args:
        layout: the sizes, with the number of experts; kept values may be in int8. bias: whether there are biases.
        dtype, device: of the floating tensors.
    """

    values: Tensor
    positions: Tensor
    left: Tensor | None
    right: Tensor | None
    left_scales: None
    right_scales: None
    bias: Tensor | None

    def __init__(self, layout: LayerFormat, bias: bool, dtype: torch.dtype | None = None, device: Any = None) -> None:
        super().__init__()
        self.layout = layout
        shapes = layout.tensors | ({"bias": layout.bias} if bias else {})
        for part in PARTS:
            put_empty_(self, part, shapes.get(part), layout.integers.get(part), dtype, device)

    @classmethod
    def of(cls, layers: Sequence[FactorizedLinear]) -> FactorizedStack:
        """The stack of layers that are alike; they are copied.

        Raises:
            ValueError: they are not.
        """
        kinds = {(layer.kind, layer.block, layer.layout.wrapper_dtype, layer.bias is None) for layer in layers}
        if len(kinds) != 1:
            raise ValueError(f"layers of one shape, block and dtype can be stacked, got {len(kinds)} kinds")
        first = layers[0]
        layout = replace(first.layout, name="experts", experts=len(layers))
        stack = cls(layout, first.bias is not None, first.dtype, first.values.device)
        with torch.no_grad():
            for part, held in stack.state_dict().items():
                for expert, layer in enumerate(layers):
                    held[expert] = getattr(layer, part)
        return stack

    @property
    def dtype(self) -> torch.dtype:
        """Of the floating tensors, and so of the inputs."""
        return (self.values if self.left is None else self.left).dtype

    @property
    def pattern(self) -> Pattern:
        """The N:M pattern of the cores."""
        return self.layout.pattern

    @property
    def each(self) -> list[tuple[Operands, Tensor | None]]:
        """The factors and the bias of each expert, views of the stack.

        All at once, since gradients at them come together in one tensor then; of a view by itself, each is as large as
        the stack.
        """
        count, d_in = len(self.values), self.layout.shape[1]
        held = (self.values, self.positions, self.left, self.right, self.bias)
        parts = [[None] * count if tensor is None else tensor.unbind() for tensor in held]
        return [(Operands(v, p, a, b, self.pattern, d_in), bias) for v, p, a, b, bias in zip(*parts, strict=True)]

    def product(self, factors: Operands, bias: Tensor | None, x: Tensor) -> Tensor:
        """What one expert's layer makes of the rows of x."""
        if is_cast(x):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        if x.dtype != factors.dtype or self._passes_gradients(x):
            y = plain.product(x, factors)
        else:
            keep, group = self.pattern.keep, self.pattern.group
            y = torch.ops.armorfact.factorized_linear(x, *factors[:4], None, None, keep, group, "")
        return y if bias is None else y + bias.to(y.dtype)

    def runs_packed(self, x: Tensor, counts: Sequence[int]) -> bool:
        """Whether rows of x, so many for each expert, are few enough to go through the packed cores at once."""
        held, dtype = self.values, self.dtype
        if is_cast(x) or x.dtype != dtype or x.device != held.device:
            return False
        kind = Kind(self.layout.shape, self.pattern, dtype, held.device, held.dtype)
        return not self._passes_gradients(x) and packed_experts.runs(kind, counts)

    def layer(self, expert: int) -> FactorizedLinear:
        """One expert's layer, a copy."""
        factors, bias = self.each[expert]
        held: dict[str, Any] = dict(zip((*PARTS[:4], "bias"), (*factors[:4], bias), strict=True))
        layout = replace(self.layout, experts=None)
        layer = FactorizedLinear.empty(layout, bias is not None, factors.dtype, factors.values.device)
        layer.load_state_dict({part: tensor for part, tensor in held.items() if tensor is not None})
        return layer

    def _passes_gradients(self, x: Tensor) -> bool:
        if in_forward_mode():
            return True
        if not torch.is_grad_enabled():
            return False
        return x.requires_grad or any(parameter.requires_grad for parameter in self.parameters())

    def extra_repr(self) -> str:
        return f"experts={self.layout.experts}, shape={self.layout.shape}, pattern={self.pattern}"


def pruned_modules(model: nn.Module) -> dict[str, FactorizedLinear | FactorizedStack]:
    """What holds the factors of a pruned model, by name."""
    kinds = (FactorizedLinear, FactorizedStack)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


Layer = TypeVar("Layer", bound=FactorizedLinear | FactorizedStack)


def master_of(layer: Layer) -> Layer:
    """A copy to train: in float32 or more, but for kept values that are integers, which stay so."""
    held = layer.values if layer.left is None else layer.left
    master = copy.deepcopy(layer)
    master.to(torch.promote_types(held.dtype, torch.float32))  # in place, as of every module
    return master
