"""The stacked experts of transformers, seen as linear layers: an adapter over what its decorator says of a class.

Classes under `transformers.integrations.use_experts_implementation` hold ``gate_up_proj`` (experts, 2 intermediate,
width), or ``up_proj``, and ``down_proj`` (experts, width, intermediate), and four flags that say how these are to be
read. No table of model families: a class without the decorator is left alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from armorfact_hf.layers.experts import FactorizedExperts
from armorfact_hf.layers.routed import PROJECTIONS, Gating, SeparateExperts, by_expert, expert_output, one_by_one

FLAGS = ("is_transposed", "is_concatenated", "has_gate", "has_bias")


@dataclass(frozen=True, eq=False)
class StackedExperts:
    """A decorated experts module.

    Args:
        module: the module.
    """

    module: Any

    @classmethod
    def of(cls, module: nn.Module) -> StackedExperts | None:
        """The adapter, or None for any other module."""
        decorated = all(flag in module.__dict__ for flag in FLAGS) and hasattr(module, "_apply_gate")
        return cls(module) if decorated and module._parameters else None

    @classmethod
    def whole(cls, module: nn.Module) -> StackedExperts | None:
        """The adapter of experts that can be taken apart into linear layers, or None."""
        stacked = cls.of(module)
        return None if stacked is None or stacked.refusal else stacked

    @property
    def refusal(self) -> str:
        """Why it cannot be taken apart, or nothing."""
        kind, held = type(self.module).__name__, dict(self.module.named_parameters())
        if getattr(self.module, "has_post_expert_norm", False):
            return f"stacked experts of a {kind}, which normalizes what each expert returns"
        if others := sorted(set(held) - set(self._weights) - {f"{name}_bias" for name in self._weights}):
            return f"stacked experts of a {kind}, which holds {', '.join(others)} beside the weights"
        if missing := [name for name in self._weights if name not in held or held[name].ndim != 3]:
            return f"stacked experts of a {kind}, which has no {missing[0]} of three dimensions"
        return ""

    @property
    def count(self) -> int:
        """How many experts there are."""
        return self.module.down_proj.shape[0]

    @property
    def projections(self) -> tuple[str, ...]:
        """The names of an expert's layers."""
        return PROJECTIONS if self.module.has_gate else PROJECTIONS[1:]

    @property
    def layers(self) -> list[dict[str, ExpertLinear]]:
        """The layers of each expert by name; made anew at every call."""
        return [{name: ExpertLinear(self, e, name) for name in self.projections} for e in range(self.count)]

    def weight(self, expert: int, projection: str) -> Tensor:
        """W of one layer, (d_out, d_in), a view."""
        weight = self._held(projection)[expert]
        return self._part(weight.T if self.module.is_transposed else weight, projection)

    def bias(self, expert: int, projection: str) -> Tensor | None:
        """Its bias, (d_out,), a view; None without."""
        return self._part(self._held(projection, "_bias")[expert], projection) if self.module.has_bias else None

    @property
    def _weights(self) -> tuple[str, str]:
        return ("gate_up_proj" if self.module.has_gate else "up_proj", "down_proj")

    def _held(self, projection: str, suffix: str = "") -> Tensor:
        first, second = self._weights
        return getattr(self.module, (second if projection == "down" else first) + suffix)

    def _part(self, rows: Tensor, projection: str) -> Tensor:
        """The rows of one projection, of those that stand in one tensor."""
        if projection == "down" or not self.module.has_gate:
            return rows
        half, second = len(rows) // 2, projection == "up"
        if self.module.is_concatenated:
            return rows[half:] if second else rows[:half]
        return rows[int(second) :: 2]


def kind_of(module: nn.Module) -> str:
    """What a module is that holds a weight and is no linear layer, in words for a reason to stay dense."""
    if (stacked := StackedExperts.of(module)) is not None:
        return stacked.refusal
    if any(weight.ndim == 3 for weight in module.parameters(recurse=False)):
        return f"weights of three dimensions of a {type(module).__name__}, as of experts that run in a way of their own"
    return f"a weight of a {type(module).__name__}"


class ExpertLinear(nn.Module):
    """One linear layer of one expert, x W' + b, with the W and b that its module holds now.

    Args:
        stacked: the experts. expert: the number of one. projection: the name of its layer.
    """

    def __init__(self, stacked: StackedExperts, expert: int, projection: str) -> None:
        super().__init__()
        self.stacked, self.expert, self.projection = stacked, expert, projection

    @property
    def weight(self) -> Tensor:
        """W, (d_out, d_in), a view of the stack."""
        return self.stacked.weight(self.expert, self.projection)

    @property
    def bias(self) -> Tensor | None:
        """b, (d_out,), a view of the stack; None without."""
        return self.stacked.bias(self.expert, self.projection)

    @property
    def gated(self) -> bool:
        """Whether the expert has a gate."""
        return self.stacked.module.has_gate

    def forward(self, x: Tensor) -> Tensor:
        """x W' + b."""
        return functional.linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"expert={self.expert}, projection={self.projection}"


def experts_among(layers: Mapping[str, nn.Module]) -> dict[Any, list[dict[str, ExpertLinear]]]:
    """By modules that any of the layers is of: the layers of each expert, those that are not given made anew."""
    found: dict[Any, list[dict[str, ExpertLinear]]] = {}
    for layer in layers.values():
        if isinstance(layer, ExpertLinear):
            owner = layer.stacked
            if owner.module not in found:
                found[owner.module] = owner.layers
            found[owner.module][layer.expert][layer.projection] = layer
    return found


@contextmanager
def run_by_expert(layers: Mapping[str, nn.Module]) -> Iterator[None]:
    """Inside, a model's experts run one after another through the given layers, so that hooks see what each is given.

    A function of ours is among transformers' implementations of experts for so long.

    Args:
        layers: linear layers of the model by name, experts' among them.
    """
    known = experts_among(layers)
    configs = {id(owner.config): owner.config for owner in known}
    before = {key: config._experts_implementation for key, config in configs.items()}
    name = f"armorfact-{id(known)}"

    def run(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        experts = known.get(module) or StackedExperts(module).layers
        gating = Gating(module)

        def output(expert: int, x: Tensor) -> Tensor:
            return expert_output(experts[expert], gating, x)

        return by_expert(hidden_states, top_k_index, top_k_weights, len(experts), one_by_one(output))

    ALL_EXPERTS_FUNCTIONS[name] = run
    try:
        for config in configs.values():
            config._experts_implementation = name
        yield
    finally:
        for key, config in configs.items():
            config._experts_implementation = before[key]
        del ALL_EXPERTS_FUNCTIONS[name]


def put_layers_(model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    """Put layers into a model by name; experts that one of them is of are taken apart first (`SeparateExperts`)."""
    for name, layer in layers.items():
        path, projection = name.rpartition(".")[::2]
        owner = path.rpartition(".")[0]
        if projection in PROJECTIONS and owner and (stacked := StackedExperts.of(model.get_submodule(owner))):
            model.set_submodule(owner, SeparateExperts(stacked.layers, Gating(stacked.module)))
        model.set_submodule(name, layer)


@contextmanager
def dense_again(model: nn.Module, layers: Mapping[str, nn.Module]) -> Iterator[None]:
    """Inside, these layers of a model are the dense ones, whatever has taken their place.

    Args:
        layers: dense linear layers of the model by name, experts' among them.
    """
    dense: dict[str, nn.Module] = {}
    for name, layer in layers.items():
        if isinstance(layer, ExpertLinear):
            dense[name.rsplit(".", 2)[0]] = layer.stacked.module
        else:
            dense[name] = layer
    before = {name: model.get_submodule(name) for name in dense}
    try:
        for name, module in dense.items():
            model.set_submodule(name, module)
        yield
    finally:
        for name, module in before.items():
            model.set_submodule(name, module)


def stack_experts_(model: nn.Module) -> None:
    """Stack experts that `put_layers_` took apart, once all their layers are pruned."""
    for name, module in list(model.named_modules()):
        if isinstance(module, SeparateExperts):
            model.set_submodule(name, FactorizedExperts.of(module))
