"""`FactorizedStack`: one linear layer of each expert, their factors stacked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from armorfact import Pattern
from armorfact_hf.layers import operators as operators  # registers what `FactorizedStack.product` calls
from armorfact_hf.layers import packed_experts, plain
from armorfact_hf.layers.format import LayerFormat
from armorfact_hf.layers.linear import FactorizedLinear
from armorfact_hf.layers.strategy import Kind, Operands

PARTS = ("values", "positions", "left", "right", "bias")


class FactorizedStack(nn.Module):
    """Linear layers of one shape, one for each expert, each stored as A C B; see `FactorizedLinear`.

    Args:
        layout: the sizes, with the number of experts. bias: whether there are biases.
        dtype, device: of the floating tensors.
    """

    values: Tensor
    positions: Tensor
    left: Tensor | None
    right: Tensor | None
    bias: Tensor | None

    def __init__(self, layout: LayerFormat, bias: bool, dtype: torch.dtype | None = None, device: Any = None) -> None:
        super().__init__()
        self.layout = layout
        shapes = layout.tensors | ({"bias": layout.bias} if bias else {})
        for part in PARTS:
            if part == "positions":
                positions = torch.zeros(shapes[part], dtype=torch.uint8, device=device)
                self.register_buffer(part, positions)
            else:
                self.register_parameter(part, _empty(shapes.get(part), dtype, device))

    @classmethod
    def of(cls, layers: Sequence[FactorizedLinear]) -> FactorizedStack:
        """The stack of layers that are alike; they are copied.

        Raises:
            ValueError: they are not.
        """
        kinds = {(layer.kind, layer.block, layer.bias is None) for layer in layers}
        if len(kinds) != 1:
            raise ValueError(f"layers of one shape, block and dtype can be stacked, got {len(kinds)} kinds")
        first = layers[0]
        layout = LayerFormat("experts", first.kind.shape, first.pattern, first.block, len(layers))
        stack = cls(layout, first.bias is not None, first.values.dtype, first.values.device)
        with torch.no_grad():
            for part, held in stack.state_dict().items():
                for expert, layer in enumerate(layers):
                    held[expert] = getattr(layer, part)
        return stack

    @property
    def pattern(self) -> Pattern:
        """The N:M pattern of the cores."""
        return self.layout.pattern

    def operands(self, expert: int) -> Operands:
        """One expert's factors, views of the stack."""
        values, positions, left, right = (
            None if held is None else held[expert] for held in (getattr(self, part) for part in PARTS[:4])
        )
        return Operands(values, positions, left, right, self.pattern, self.layout.shape[1])  # type: ignore[arg-type]

    def product(self, expert: int, x: Tensor) -> Tensor:
        """What one expert's layer makes of the rows of x."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        factors = self.operands(expert)
        if x.dtype != factors.values.dtype or (torch.is_grad_enabled() and self._asks_for_gradients(x)):
            y = plain.product(x, factors)
        else:
            keep, group = self.pattern.keep, self.pattern.group
            y = torch.ops.armorfact.factorized_linear(x, *factors[:4], None, None, keep, group, "")
        return y if self.bias is None else y + self.bias[expert].to(y.dtype)

    def runs_packed(self, x: Tensor, counts: Sequence[int]) -> bool:
        """Whether rows of x, so many for each expert, are few enough to go through the packed cores at once."""
        held = self.values
        if torch.is_autocast_enabled(x.device.type) or x.dtype != held.dtype:
            return False
        kind = Kind(self.layout.shape, self.pattern, held.dtype, held.device)
        gradients = torch.is_grad_enabled() and self._asks_for_gradients(x)
        return not gradients and packed_experts.runs(kind, counts)

    def layer(self, expert: int) -> FactorizedLinear:
        """One expert's layer, a copy."""
        factors, bias = self.operands(expert), self.bias
        held: dict[str, Any] = dict(zip(PARTS, (*factors[:4], None if bias is None else bias[expert]), strict=True))
        device, dtype = factors.values.device, factors.values.dtype
        layer = FactorizedLinear(
            *self.layout.shape, self.pattern, self.layout.block, bias is not None, dtype=dtype, device=device
        )
        layer.load_state_dict({part: tensor for part, tensor in held.items() if tensor is not None})
        return layer

    def _asks_for_gradients(self, x: Tensor) -> bool:
        return x.requires_grad or any(parameter.requires_grad for parameter in self.parameters())

    def extra_repr(self) -> str:
        return f"experts={self.layout.experts}, shape={self.layout.shape}, pattern={self.pattern}"


def _empty(shape: tuple[int, ...] | None, dtype: torch.dtype | None, device: Any) -> nn.Parameter | None:
    if shape is None:
        return None
    return nn.Parameter(torch.zeros(shape, dtype=dtype, device=device), requires_grad=False)
