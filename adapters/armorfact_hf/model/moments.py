"""Second moments of the inputs of linear layers, gathered while a decoder block runs.

Layers that are given the same tensor (query, key and value projections; gate and up projections) share one Gram matrix:
it is accumulated once. Products are taken in float32, whatever the model computes in, and summed in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

from torch import Tensor, nn


@dataclass(frozen=True)
class Moments:
    """What is known of a layer's inputs X.

    Args:
        gram: H = X X', (d_in, d_in) float64, or its diagonal (d_in,).
        cross: X_dense X', (d_in, d_in) float64, or None.
        tokens: the number of columns of X.
    """

    gram: Tensor
    cross: Tensor | None
    tokens: int


@dataclass
class Inputs:
    """The distinct inputs of linear layers in one forward pass.

    Args:
        leader: for each layer that was called, the first one that was given the same tensor.
        tensors: the input of each leader, as the module got it, (..., d_in).
    """

    leader: dict[str, str] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def see(self, name: str, given: Tensor) -> None:
        """Note that layer ``name`` was called on ``given``."""
        same = (other for other, tensor in self.tensors.items() if tensor is given)
        self.leader[name] = leader = next(same, name)
        self.tensors[leader] = given


@contextmanager
def recorded_inputs(layers: Mapping[str, nn.Module]) -> Iterator[Inputs]:
    """What each of the layers is given, for one forward pass inside the context."""
    inputs = Inputs()

    def hook(name: str) -> Callable:
        return lambda _, args: inputs.see(name, args[0])

    with ExitStack() as stack:
        for name, module in layers.items():
            handle = module.register_forward_pre_hook(hook(name))
            stack.callback(handle.remove)
        yield inputs


@dataclass
class Statistics:
    """Second moments over all tokens seen, for the layers of one decoder block.

    Args:
        correlations: whether to gather whole matrices, or only their diagonals.
        leader: the layer under whose name the moments of a layer stand.
        gram: H = X X' by leader, (d_in, d_in) float64, or its diagonal (d_in,).
        cross: X_dense X' by leader, (d_in, d_in) float64, where dense inputs were given as well.
        tokens: how many tokens each leader saw.
    """

    correlations: bool = True
    leader: dict[str, str] = field(default_factory=dict)
    gram: dict[str, Tensor] = field(default_factory=dict)
    cross: dict[str, Tensor] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)

    def add(self, inputs: Inputs, dense: Inputs | None = None) -> None:
        """Count the inputs of one pass; ``dense`` holds those of the dense model on the same tokens.

        Raises:
            RuntimeError: layers share inputs differently than in the passes before.
        """
        for name, leader in inputs.leader.items():
            if self.leader.setdefault(name, leader) != leader:
                raise RuntimeError(
                    f"{name} shares its input with {leader} in this pass and with {self.leader[name]} in an earlier "
                    "one: leave one of them out with `ignore`"
                )
        for leader, tensor in inputs.tensors.items():
            x = _flat(tensor)
            self.tokens[leader] = self.tokens.get(leader, 0) + len(x)
            _accumulate(self.gram, leader, x.T @ x if self.correlations else (x * x).sum(0))
            if dense is not None:
                _accumulate(self.cross, leader, _flat(dense.tensors[leader]).T @ x)

    def of(self, name: str) -> Moments:
        """What is known of the inputs of one layer."""
        leader = self.leader[name]
        return Moments(self.gram[leader], self.cross.get(leader), self.tokens[leader])


def _flat(tensor: Tensor) -> Tensor:
    return tensor.detach().flatten(0, -2).float()


def _accumulate(sums: dict[str, Tensor], key: str, product: Tensor) -> None:
    if key in sums:
        sums[key] += product
    else:
        sums[key] = product.double()
