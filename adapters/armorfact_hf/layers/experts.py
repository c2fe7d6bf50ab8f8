"""`FactorizedExperts`: a mixture's experts whose weights are stored, and applied, as A C B.

It takes the place of an experts module of transformers, and is called like it (`armorfact_hf.layers.routed`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from armorfact_hf.layers.routed import PROJECTIONS, Gating, SeparateExperts, by_expert, expert_output, one_by_one
from armorfact_hf.layers.stack import FactorizedStack
from armorfact_hf.layers.strategies import packed_experts


class FactorizedExperts(nn.Module):
    """Experts whose weights are stacked as they are saved, and applied, as A C B.

    Its parameters are named ``gate.values``, ``gate.positions``, …, ``down.right``, with the experts as the first
    dimension. (Under ``gate_up_proj`` or ``down_proj`` transformers would take them for dense weights when it saves,
    rename them and cut them in two.)

    Args:
        stacks: by their names in `PROJECTIONS`; gate and up run as one. gating: what is computed between them.

    Raises:
        ValueError: gate and up are of other dtypes, or one alone has biases.
    """

    def __init__(self, stacks: Mapping[str, FactorizedStack], gating: Gating) -> None:
        super().__init__()
        gate, up = stacks.get("gate"), stacks["up"]
        if gate is not None and _stored(gate) != _stored(up):
            raise ValueError("expected gate and up in the same dtypes, both with biases or neither")
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
        """y, see `by_expert`. A few tokens go through all their experts at once.

        Raises:
            ValueError: x is on another device than the experts.
        """
        if hidden_states.device != (held := self.stacks["up"].values.device):
            raise ValueError(f"expected an input on {held}, as the experts are, got {hidden_states.device}")
        return by_expert(hidden_states, top_k_index, top_k_weights, self.num_experts, self._outputs)

    def _outputs(self, x: Tensor, counts: list[int]) -> Tensor:
        stacks = self.stacks
        if not all(stack.runs_packed(x, counts) for stack in stacks.values()):
            return self._apart(x, counts)
        gate_up = _side_by_side(x, counts, [stack for name, stack in stacks.items() if name != "down"])
        gate, up = gate_up.chunk(2, dim=-1) if "gate" in stacks else (None, gate_up)
        return _side_by_side(self.gating(gate, up), counts, [stacks["down"]])

    def _apart(self, x: Tensor, counts: list[int]) -> Tensor:
        held = {name: (stack.product, stack.each) for name, stack in self.stacks.items()}

        def output(expert: int, rows: Tensor) -> Tensor:
            layers = {name: partial(product, *each[expert]) for name, (product, each) in held.items()}
            return expert_output(layers, self.gating, rows)

        return one_by_one(output)(x, counts)


def _stored(stack: FactorizedStack) -> tuple[torch.dtype, torch.dtype, bool]:
    return stack.values.dtype, stack.dtype, stack.bias is None


def _side_by_side(x: Tensor, counts: list[int], stacks: Sequence[FactorizedStack]) -> Tensor:
    """What the experts' layers of several stacks make of their rows of x, in one compiled call."""
    factors = [(stack.values, stack.positions, stack.left, stack.right) for stack in stacks]
    y = packed_experts.product(x, counts, factors)
    held = [stack.bias for stack in stacks if stack.bias is not None]
    return y + packed_experts.biases(torch.cat(held, dim=-1), counts) if held else y
