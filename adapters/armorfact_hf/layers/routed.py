"""Tokens that a router sends to experts, each through the layers of its own.

In transformers the weights of all experts stand in one tensor, and a module computes, for the tokens x_t, the experts
e(t, k) that a router chose for each and their weights w(t, k),

    y_t = sum over k of w(t, k) f_e(x_t),   f_e(x) = W_down act(W_gate x, W_up x)

What a module does between its products (`Gating`) stays its own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

PROJECTIONS = ("gate", "up", "down")  # of an expert, in the order in which they are run


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
        top_k_index, top_k_weights: e and w, (tokens, k). An index of ``experts`` or more
            is no expert's, and adds nothing.
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
