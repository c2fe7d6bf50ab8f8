"""`FactorizedExperts`: a mixture's experts whose weights are stored, and applied, as A C B.

In transformers the weights of all experts stand in one tensor, and a module computes, for the tokens x_t, the experts
e(t, k) that a router chose for each and their weights w(t, k),

    y_t = sum over k of w(t, k) f_e(x_t),   f_e(x) = W_down act(W_gate x, W_up x)

The modules here take the place of such a module. They are called like it, and what it does between its products
(`Gating`) stays its own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from armorfact import Pattern
from armorfact_hf.layers import operators as operators  # registers what `FactorizedStack.product` calls
from armorfact_hf.layers import packed_experts, plain
from armorfact_hf.layers.format import LayerFormat
from armorfact_hf.layers.linear import FactorizedLinear
from armorfact_hf.layers.strategy import Kind, Operands

PROJECTIONS = ("gate", "up", "down")  # of an expert, in the order in which they are run
PARTS = ("values", "positions", "left", "right", "bias")


class Gating:
    """What an experts module computes between its products: act(gate, up), or act(up) where it has no gate.

    Args:
        module: of a class that transformers' `use_experts_implementation` decorates. Its weights are not kept.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module: Any = copy.copy(module)
        self.module._parameters = {}

    def __call__(self, gate: Tensor | None, up: Tensor) -> Tensor:
        """(tokens, intermediate) for what gate (None without one) and up make of the tokens, of the same shape."""
        if gate is None:
            return self.module.act_fn(up)
        if self.module.is_concatenated:
            return self.module._apply_gate(torch.cat([gate, up], dim=-1))
        return self.module._apply_gate(torch.stack([gate, up], dim=-1).flatten(-2))


def expert_output(layers: Mapping[str, Callable[[Tensor], Tensor]], gating: Gating, x: Tensor) -> Tensor:
    """f_e(x) for the rows of x, with the layers of one expert by their names in `PROJECTIONS`."""
    gate = layers["gate"](x) if "gate" in layers else None
    return layers["down"](gating(gate, layers["up"](x)))


def by_expert(
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    experts: int,
    outputs: Callable[[Tensor, list[int]], Tensor],
) -> Tensor:
    """y (tokens, width), each expert on its own tokens.

    Args:
        hidden_states: x, (tokens, width).
        top_k_index, top_k_weights: e and w, (tokens, k). An index that is no expert's adds nothing.
        experts: how many there are.
        outputs: f, called with rows of x, those of the first expert first, and how many each has; at least one has any.
    """
    tokens, slots = top_k_index.shape
    chosen = top_k_index.reshape(-1)
    counts = torch.bincount(chosen.clamp(max=experts), minlength=experts + 1)[:experts].tolist()
    order = torch.argsort(chosen, stable=True)[: sum(counts)]
    if not len(order):
        return torch.zeros_like(hidden_states)
    found = outputs(hidden_states[order // slots], counts)
    placed = found.new_zeros(tokens * slots, found.shape[-1]).index_copy(0, order, found)
    return (placed.view(tokens, slots, -1) * top_k_weights[..., None]).sum(dim=1).to(hidden_states.dtype)


def one_by_one(output: Callable[[int, Tensor], Tensor]) -> Callable[[Tensor, list[int]], Tensor]:
    """What `by_expert` asks for, of a function of one expert and its rows."""

    def outputs(x: Tensor, counts: list[int]) -> Tensor:
        return torch.cat([output(expert, rows) for expert, rows in enumerate(x.split(counts)) if len(rows)])

    return outputs


class SeparateExperts(nn.Module):
    """Experts whose layers are modules of their own, named as "7.gate": what a pruning run works on.

    Args:
        experts: the layers of each, by their names in `PROJECTIONS`.
        gating: what is computed between them.
    """

    def __init__(self, experts: Sequence[Mapping[str, nn.Module]], gating: Gating) -> None:
        super().__init__()
        self.gating = gating
        for number, layers in enumerate(experts):
            self.add_module(str(number), nn.ModuleDict(layers))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """y, see `by_expert`."""

        def output(expert: int, x: Tensor) -> Tensor:
            return expert_output(self.layers(expert), self.gating, x)

        return by_expert(hidden_states, top_k_index, top_k_weights, len(self._modules), one_by_one(output))

    def layers(self, expert: int) -> Any:
        """Those of one expert by name."""
        return self._modules[str(expert)]


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


class FactorizedExperts(nn.Module):
    """Experts whose weights are stacked as they are saved, and applied, as A C B.

    Its parameters are named ``gate.values``, ``gate.positions``, …, ``down.right``, with the experts as the first
    dimension. (Under ``gate_up_proj`` or ``down_proj`` transformers would take them for dense weights when it saves,
    rename them and cut them in two.)

    Args:
        stacks: by their names in `PROJECTIONS`. gating: what is computed between them.
    """

    def __init__(self, stacks: Mapping[str, FactorizedStack], gating: Gating) -> None:
        super().__init__()
        self.gating = gating
        for name in PROJECTIONS:
            if name in stacks:
                self.add_module(name, stacks[name])

    @classmethod
    def of(cls, separate: SeparateExperts) -> FactorizedExperts:
        """The experts of a pruning run, stacked."""
        numbers = range(len(separate._modules))
        stacks = {
            name: FactorizedStack.of([separate.layers(number)[name] for number in numbers])
            for name in separate.layers(0)
        }
        return cls(stacks, separate.gating)

    @property
    def stacks(self) -> dict[str, FactorizedStack]:
        """By their names in `PROJECTIONS`."""
        return {name: self._modules[name] for name in PROJECTIONS if name in self._modules}  # type: ignore[misc]

    @property
    def num_experts(self) -> int:
        """How many there are."""
        return next(iter(self.stacks.values())).layout.experts or 0

    def separate(self) -> SeparateExperts:
        """The layers as modules of their own; they are copied."""
        experts = [
            {name: stack.layer(number) for name, stack in self.stacks.items()} for number in range(self.num_experts)
        ]
        return SeparateExperts(experts, self.gating)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """y, see `by_expert`. A few tokens on a CPU go through all their experts at once."""
        return by_expert(hidden_states, top_k_index, top_k_weights, self.num_experts, self._outputs)

    def _outputs(self, x: Tensor, counts: list[int]) -> Tensor:
        stacks = self.stacks
        if not all(stack.runs_packed(x, counts) for stack in stacks.values()):
            return one_by_one(self._output)(x, counts)
        gate_up = _side_by_side(x, counts, [stack for name, stack in stacks.items() if name != "down"])
        gate, up = gate_up.chunk(2, dim=-1) if "gate" in stacks else (None, gate_up)
        return _side_by_side(self.gating(gate, up), counts, [stacks["down"]])

    def _output(self, expert: int, x: Tensor) -> Tensor:
        layers = {name: partial(stack.product, expert) for name, stack in self.stacks.items()}
        return expert_output(layers, self.gating, x)


def _side_by_side(x: Tensor, counts: list[int], stacks: Sequence[FactorizedStack]) -> Tensor:
    """What the experts' layers of several stacks make of their rows of x, in one compiled call."""
    factors = [(stack.values, stack.positions, stack.left, stack.right) for stack in stacks]
    y = packed_experts.product(x, counts, factors)
    held = [stack.bias for stack in stacks if stack.bias is not None]
    return y + packed_experts.biases(torch.cat(held, dim=-1), counts) if held else y
