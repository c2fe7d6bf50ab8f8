"""Second moments of the inputs of linear layers, gathered while a decoder block runs.

Layers that are given the same tensor (query, key and value projections; gate and up projections) share one Gram matrix:
it is accumulated once. Products are taken in float32, whatever the model computes in, and summed in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

ROUTED = (
    "target='output' pairs what the dense and the pruned model compute for the same tokens, and experts choose theirs "
    "anew in each; take target='weight', or leave such layers out with ignore"
)

# Columns: narrower ones save no more products, and wider ones fewer (benchmarks/moments.py).
PANEL = 256


@dataclass(frozen=True)
class Moments:
    """What is known of a layer's inputs X.

    Args:
        gram: H = X X', (d_in, d_in) float64.
        cross: X_dense X', (d_in, d_in) float64, or None.
        tokens: the number of columns of X.
    """

    gram: Tensor
    cross: Tensor | None
    tokens: int


@dataclass
class Inputs:
    """What linear layers are given in one forward pass.

    Args:
        calls: for each layer that was called, its inputs in the order of its calls, (..., d_in) each.
    """

    calls: dict[str, list[Tensor]] = field(default_factory=dict)

    def see(self, name: str, given: Tensor) -> None:
        """Note that layer ``name`` was called on ``given``."""
        self.calls.setdefault(name, []).append(given)

    @property
    def leader(self) -> dict[str, str]:
        """For each layer that was called, the first one that was given the same tensors."""
        first: dict[tuple[int, ...], str] = {}
        return {name: first.setdefault(tuple(map(id, tensors)), name) for name, tensors in self.calls.items()}

    def of(self, names: Collection[str]) -> Inputs:
        """What these layers are given, of those that were called."""
        return Inputs({name: tensors for name, tensors in self.calls.items() if name in names})

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The input of each leader, (..., d_in); those of several calls one below the other."""
        return {name: _joined(self.calls[name]) for name in self.leader.values()}


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat([tensor.flatten(0, -2) for tensor in tensors])


@contextmanager
def recorded_inputs(layers: Mapping[str, nn.Module]) -> Iterator[Inputs]:
    """What each of the layers is given, for one forward pass inside the context."""
    inputs = Inputs()

    def hook(name: str) -> Callable:
        return lambda _, args, kwargs: inputs.see(name, next(iter((*args, *kwargs.values()))))

    with ExitStack() as stack:
        for name, module in layers.items():
            handle = module.register_forward_pre_hook(hook(name), with_kwargs=True)
            stack.callback(handle.remove)
        yield inputs


@contextmanager
def recorded_gradients(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """The gradient at what each module returns, once a backward pass inside the context has been there."""
    found: dict[str, Tensor] = {}

    def hook(name: str) -> Callable:
        def keep(_: nn.Module, __: Any, output: Tensor) -> None:
            if output.requires_grad:
                output.register_hook(lambda gradient: found.__setitem__(name, gradient.detach()))

        return keep

    with ExitStack() as stack:
        for name, module in modules.items():
            stack.callback(module.register_forward_hook(hook(name)).remove)
        yield found


@dataclass
class Statistics:
    """Second moments over all tokens seen, for the layers of one decoder block.

    Args:
        leader: the layer under whose name the moments of a layer stand.
        gram: H = X X' by leader, (d_in, d_in) float64.
        cross: X_dense X' by leader, (d_in, d_in) float64, where dense inputs were given as well.
        tokens: how many tokens each leader saw.
    """

    leader: dict[str, str] = field(default_factory=dict)
    gram: dict[str, Tensor] = field(default_factory=dict)
    cross: dict[str, Tensor] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)

    def add(self, inputs: Inputs, dense: Inputs | None = None) -> None:
        """Count the inputs of one pass; ``dense`` holds those of the dense model on the same tokens.

        Raises:
            RuntimeError: layers share inputs differently than in the passes before.
            ValueError: a layer was given other tokens in the dense pass.
        """
        leaders, given = inputs.leader, inputs.tensors
        paired = {} if dense is None else _paired(given, dense)
        merge_leaders_(self.leader, leaders)
        for leader, tensor in given.items():
            x = _flat(tensor)
            self.tokens[leader] = self.tokens.get(leader, 0) + len(x)
            add_gram_(_sum_of(self.gram, leader, x), x)
            if leader in paired:
                _sum_of(self.cross, leader, x).add_(_flat(paired[leader]).T @ x)

    def drop(self, names: Collection[str]) -> None:
        """Give up what is known of these layers; those that share an input with any of them are among them."""
        for held in (self.leader, self.gram, self.cross, self.tokens):
            for name in held.keys() & set(names):
                del held[name]

    def of(self, name: str) -> Moments:
        """What is known of the inputs of one layer."""
        leader = self.leader[name]
        return Moments(self.gram[leader], self.cross.get(leader), self.tokens[leader])


def merge_leaders_(known: dict[str, str], leaders: Mapping[str, str]) -> None:
    """Add the leaders of one more pass to those of the passes before.

    Raises:
        RuntimeError: layers share inputs differently.
    """
    for name, leader in leaders.items():
        if known.setdefault(name, leader) != leader:
            raise RuntimeError(
                f"{name} shares its input with {leader} in this pass and with {known[name]} in an earlier one: leave "
                "one of them out with `ignore`"
            )


def _paired(given: Mapping[str, Tensor], dense: Inputs) -> dict[str, Tensor]:
    """The inputs of the dense model that go with those given."""
    calls = {name: _joined(dense.calls[name]) for name in given if name in dense.calls}
    for name, tensor in given.items():
        if name not in calls or calls[name].shape != tensor.shape:
            raise ValueError(
                f"{name} is given {_flat(tensor).shape[0]} tokens of a window, and "
                f"{_flat(calls[name]).shape[0] if name in calls else 0} in the dense model: {ROUTED}"
            )
    return calls


def _flat(tensor: Tensor) -> Tensor:
    return tensor.detach().flatten(0, -2).float()


def _sum_of(sums: dict[str, Tensor], leader: str, x: Tensor) -> Tensor:
    """The sum that stands under a leader's name, (d_in, d_in) float64; a new one begins at zero."""
    if leader not in sums:
        sums[leader] = x.new_zeros(x.shape[1], x.shape[1], dtype=torch.float64)
    return sums[leader]


def add_gram_(total: Tensor, x: Tensor, panel: int = PANEL) -> None:
    """Add x' x, panel by panel of its lower triangle: the upper one mirrors it, which is half of the products.

    Args:
        total: (d, d), symmetric. x: (tokens, d). panel: columns that are multiplied at a time.
    """
    for start in range(0, x.shape[1], panel):
        end = start + panel
        product = x[:, start:].T @ x[:, start:end]
        total[start:, start:end] += product
        total[start:end, end:] += product[panel:].T
