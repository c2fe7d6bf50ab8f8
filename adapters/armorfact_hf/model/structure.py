"""Find the decoder blocks of a causal language model, and the linear layers in them, by structure.

No table of model families: decoder blocks are the list of like modules that holds most of the linear weights.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional
from torch.nn.utils import parametrize
from transformers.pytorch_utils import Conv1D

from armorfact_hf.layers.linear import FactorizedLinear
from armorfact_hf.model.causal_lm import CausalLM
from armorfact_hf.model.experts import ExpertLinear, StackedExperts, kind_of

Select = Callable[[str, nn.Module], bool]


@dataclass(frozen=True)
class Layer:
    """A linear layer that is to be pruned.

    Args:
        name: of the module in the model.
        module: `torch.nn.Linear`; GPT-2's `Conv1D`, which stores its weight transposed; or a view of stacked experts.
        decoder_block: index of the decoder block that holds it; None for the head.
        block: (block_out, block_in) of the wrappers that it gets, or None.
        unfit: why no wrappers fit it, where that was looked into and none do.
    """

    name: str
    module: nn.Linear | Conv1D | ExpertLinear
    decoder_block: int | None
    block: tuple[int, int] | None = None
    unfit: str = ""

    @property
    def weight(self) -> Tensor:
        """W, (d_out, d_in), a view that does not require gradients."""
        weight = self.module.weight.detach()
        return weight.T if isinstance(self.module, Conv1D) else weight

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in)."""
        d_out, d_in = self.weight.shape
        return d_out, d_in

    @property
    def stack(self) -> str:
        """The name of the experts module that it is of, or nothing."""
        return self.name.rsplit(".", 2)[0] if isinstance(self.module, ExpertLinear) else ""

    @property
    def follows_gate(self) -> bool:
        """Whether it is an expert's up projection, given the same tokens as its gate."""
        return isinstance(self.module, ExpertLinear) and self.module.projection == "up" and self.module.gated

    @property
    def weightless(self) -> Layer:
        """The same layer, of which nothing but the sizes is known."""
        if isinstance(self.module, ExpertLinear):
            stacked = StackedExperts(_on_meta(self.module.stacked.module))
            return replace(self, module=ExpertLinear(stacked, self.module.expert, self.module.projection))
        return replace(self, module=_on_meta(self.module))

    @property
    def stored_in(self) -> tuple[str, int | None]:
        """The name under which it is stored, and how many layers are in one stack there; None for it alone."""
        if not isinstance(self.module, ExpertLinear):
            return self.name, None
        return f"{self.stack}.{self.module.projection}", self.module.stacked.count


def _on_meta(module: Any) -> Any:
    """A copy of a module whose own parameters take no memory; those of the module stay as they are."""
    twin = copy.copy(module)
    twin._parameters = {
        name: None if tensor is None else nn.Parameter(tensor.detach().to("meta"), requires_grad=False)
        for name, tensor in module._parameters.items()
    }
    return twin


@dataclass(frozen=True)
class DenseLayer:
    """Weights that stay dense, and why."""

    name: str
    reason: str


def decoder_blocks(model: nn.Module) -> tuple[str, list[nn.Module]]:
    """The name of the module list that holds the decoder blocks, and the blocks in order.

    Raises:
        ValueError: no module list of the model holds a linear layer.
    """
    lists = [(name, list(module)) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    weighed = [(_linear_weights(blocks), name, blocks) for name, blocks in lists]
    # The outermost list comes first, so that it wins against a list of experts in its only block.
    most, name, blocks = max(weighed, key=lambda found: found[0], default=(0, "", []))
    if not most:
        raise ValueError(
            f"{type(model).__name__} has no torch.nn.ModuleList with linear layers in it: expected a decoder-only "
            "causal language model such as AutoModelForCausalLM loads"
        )
    return name, blocks


def _linear_weights(blocks: Iterable[nn.Module]) -> int:
    modules = [module for block in blocks for module in block.modules()]
    dense = sum(module.weight.numel() for module in modules if is_linear(module))
    return dense + sum(x.out_features * x.in_features for x in modules if isinstance(x, FactorizedLinear))


def is_linear(module: nn.Module) -> TypeGuard[nn.Linear | Conv1D]:
    """Whether a module computes x W' + b with a W of its own."""
    return isinstance(module, nn.Linear | Conv1D)


def more_than_linear(module: nn.Linear | Conv1D) -> str:
    """What a linear layer does beside x W' + b, which would be lost with it; nothing if that is all."""
    if parametrize.is_parametrized(module):
        return "its weight is parametrized, and made anew in every pass"
    if module._forward_hooks or module._forward_pre_hooks:
        return "it has forward hooks"
    inherited = type(module).forward in (nn.Linear.forward, Conv1D.forward)
    if "forward" in module.__dict__ or not (inherited or _computes_no_more(module)):
        return f"a {type(module).__name__} with a forward of its own, which computes more than x W' + b"
    return ""


@torch.no_grad()
def _computes_no_more(module: nn.Linear | Conv1D) -> bool:
    """Whether a module whose class has a forward of its own, as Falcon's do, still computes x W' + b: by trying it."""
    if set(module.state_dict()) - {"weight", "bias"}:
        return False
    held = {name: _numbers(tensor) for name, tensor in module.named_parameters()}
    weight, bias = held["weight"], held.get("bias")
    if isinstance(module, Conv1D):
        weight = weight.T
    x = torch.arange(3.0 * weight.shape[-1], dtype=torch.float64).sin().reshape(3, -1)
    x = (x * torch.tensor([[0.01], [1.0], [100.0]])).to(weight)
    try:
        found, expected = functional_call(module, held, (x,)).double(), functional.linear(x, weight, bias).double()
    except (TypeError, ValueError, RuntimeError, AttributeError):  # a router may return a tuple
        return False
    sums = functional.linear(x.double().abs(), weight.double().abs()).norm(dim=-1)
    rounding = 4 * torch.finfo(weight.dtype).eps * expected.norm(dim=-1) + 1e-5 * sums
    return bool(((found - expected).norm(dim=-1) <= rounding).all())


def _numbers(tensor: Tensor) -> Tensor:
    """The tensor, or one like it where it holds no numbers."""
    if not tensor.is_meta:
        return tensor
    return torch.arange(tensor.numel(), dtype=torch.float64).sin().reshape(tensor.shape).to(tensor.dtype)


def chosen_layers(
    model: nn.Module,
    include: Sequence[str] = ("re:.*",),
    ignore: Sequence[str] = (),
    head: bool = False,
    select: Select | None = None,
) -> tuple[list[Layer], list[DenseLayer]]:
    """The linear layers to prune, in the order of the model, and the weights left dense on purpose.

    Args:
        model: a causal language model.
        include, ignore, head: see `armorfact_hf.PruneConfig`.
        select: called with name and module of each layer that ``include`` and ``ignore`` let through; keeps it if true.

    Raises:
        ValueError: an expression that matches no linear layer of the decoder blocks, or nothing is left to prune.
    """
    prefix, blocks = decoder_blocks(model)
    found = [
        Layer(f"{prefix}.{index}.{name}", module, index)
        for index, block in enumerate(blocks)
        for name, module in _linear_layers(block)
    ]
    _check_expressions(found, include, ignore)
    chosen, skipped, shared = [], [], shared_weights(prefix, blocks)
    for layer in found:
        if reason := _others(layer, shared) or _reason_to_skip(layer, include, ignore, select):
            skipped.append(DenseLayer(layer.name, reason))
        else:
            chosen.append(layer)
    _refuse_some_experts(chosen, skipped)
    dense = _other_weights(prefix, blocks) + skipped
    if head:
        chosen.append(_head(model))
    if not chosen:
        first = f": {skipped[0].name}: {skipped[0].reason}" if skipped else ""
        raise ValueError(f"include, ignore and select leave no linear layer to prune{first}")
    return chosen, dense


def shared_weights(prefix: str, blocks: Sequence[nn.Module]) -> dict[int, list[str]]:
    """The names of each parameter of the decoder blocks, by its identity, where it has more than one."""
    names: dict[int, list[str]] = {}
    for index, block in enumerate(blocks):
        for name, parameter in block.named_parameters(remove_duplicate=False):
            names.setdefault(id(parameter), []).append(f"{prefix}.{index}.{name}")
    return {parameter: found for parameter, found in names.items() if len(found) > 1}


def _others(layer: Layer, shared: Mapping[int, list[str]]) -> str:
    """Why a layer stays dense whose weight is another one's as well: each is pruned by what it is given."""
    held = layer.module.stacked.module if isinstance(layer.module, ExpertLinear) else layer.module
    for parameter in held._parameters.values():
        if others := shared.get(id(parameter)):
            return f"its weight has {len(others)} places, {others[0]} and {others[1]} among them"
    return ""


def _reason_to_skip(layer: Layer, include: Sequence[str], ignore: Sequence[str], select: Select | None) -> str:
    if not any(matches(expression, layer.name) for expression in include):
        return "not included"
    for expression in ignore:
        if matches(expression, layer.name):
            return f"ignored by {expression!r}"
    if not isinstance(layer.module, ExpertLinear) and (reason := more_than_linear(layer.module)):
        return reason
    return "" if select is None or select(layer.name, layer.module) else "not selected"


def matches(expression: str, name: str) -> bool:
    """Whether "re:..." matches from the start of a module name, or plain text is the name or its last parts."""
    if expression.startswith("re:"):
        return re.match(expression[3:], name) is not None
    return f".{name}".endswith(f".{expression}")


def _check_expressions(layers: Sequence[Layer], include: Sequence[str], ignore: Sequence[str]) -> None:
    for expression in (*include, *ignore):
        if not any(matches(expression, layer.name) for layer in layers):
            names = sorted({layer.name.rpartition(".")[2] for layer in layers})
            raise ValueError(
                f"{expression!r} matches no linear layer in the decoder blocks; their names look like "
                f"{layers[0].name!r} and end in: {', '.join(names)}"
            )


def _other_weights(prefix: str, blocks: Sequence[nn.Module]) -> list[DenseLayer]:
    """Matrices in the decoder blocks that no linear layer holds, such as those of routers."""
    return [
        DenseLayer(f"{prefix}.{index}.{name}.{key}".replace("..", "."), f"not a linear layer: {kind_of(module)}")
        for index, block in enumerate(blocks)
        for name, module in block.named_modules()
        if not is_linear(module) and StackedExperts.whole(module) is None
        for key, weight in module.named_parameters(recurse=False)
        if weight.ndim >= 2 and min(weight.shape) > 1
    ]


def _linear_layers(block: nn.Module) -> Iterator[tuple[str, nn.Linear | Conv1D | ExpertLinear]]:
    """The linear layers of a decoder block by name, those of stacked experts among them."""
    for name, module in block.named_modules(remove_duplicate=False):
        if is_linear(module):
            yield name, module
        elif (stacked := StackedExperts.whole(module)) is not None:
            for expert, layers in enumerate(stacked.layers):
                yield from ((f"{name}.{expert}.{projection}", layer) for projection, layer in layers.items())


def _refuse_some_experts(chosen: Sequence[Layer], skipped: Sequence[DenseLayer]) -> None:
    """Experts are stored in one stack: all of them are pruned, with all their layers, or none."""
    stacks = {name for layer in chosen if (name := layer.stack)}
    for layer in skipped:
        if (stack := layer.name.rsplit(".", 2)[0]) in stacks:
            raise ValueError(
                f"{layer.name} is {layer.reason}, and other layers of {stack} are not: experts are pruned all "
                f"together; name 're:.*experts' in ignore, or include and select them all"
            )


def _head(model: CausalLM) -> Layer:
    head = model.get_output_embeddings()
    if head is None or not is_linear(head):
        raise ValueError(f"head=True: {type(model).__name__} has no linear output head")
    if reason := more_than_linear(head):
        raise ValueError(f"head=True: the head cannot be pruned: {reason}")
    name = next(name for name, module in model.named_modules() if module is head)
    return Layer(name, head, None)
