"""The pruned layers of a model while they are trained: once in float32, once as they are stored, once at their best."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from armorfact_hf.layers.linear import FactorizedLinear
from armorfact_hf.layers.stack import master_of, pruned_modules
from armorfact_hf.model.stream import frozen


class TrainedFactors:
    """Factors to train, in float32 or more, and the layers that they are rounded into.

    Args:
        model: holds pruned layers.
        parts: which of their tensors are trained, of left, right and values, where a layer has them.

    Attributes:
        parameters: what is trained, by the name that the tensor has in the model.
        best: the tensors of the best state so far, in the dtypes in which they are stored; at first those found.
    """

    def __init__(self, model: nn.Module, parts: Sequence[str]) -> None:
        self.model = model
        self.stored = pruned_modules(model)
        self.masters = {name: master_of(layer) for name, layer in self.stored.items()}
        self.parameters = {
            f"{name}.{part}": tensor
            for name, layer in self.masters.items()
            for part in parts
            if (tensor := getattr(layer, part)) is not None
        }
        for parameter in self.parameters.values():
            parameter.requires_grad_(True)
        self.best = {name: tensor.clone() for name, tensor in self._rounded.items()}
        ours = {parameter for layer in self.stored.values() for parameter in layer.parameters()}
        self.halves = [p for p in model.parameters() if p.dtype == torch.float16 and p not in ours]

    @property
    def _rounded(self) -> dict[str, Tensor]:
        """The tensors of the stored layers that the parameters are rounded into."""
        places = (name.rpartition(".") for name in self.parameters)
        return {f"{layer}.{part}": getattr(self.stored[layer], part).detach() for layer, _, part in places}

    def train_(self) -> None:
        """The model computes with the factors that are trained."""
        self._put(self.masters, torch.float32)

    @torch.no_grad()
    def store_(self) -> None:
        """The model computes with those factors rounded, as they would be stored."""
        for name, tensor in self._rounded.items():
            tensor.copy_(self.parameters[name])
        self._put(self.stored, torch.float16)

    @torch.no_grad()
    def keep_(self) -> None:
        """What is stored now is the best so far."""
        for name, tensor in self._rounded.items():
            self.best[name].copy_(tensor)

    @torch.no_grad()
    def finish_(self) -> None:
        """The model computes with the best, as stored."""
        for name, tensor in self._rounded.items():
            tensor.copy_(self.best[name])
        self._put(self.stored, torch.float16)

    def _put(self, layers: Mapping[str, nn.Module], halves: torch.dtype) -> None:
        """Float16 does not mix with bfloat16 everywhere, and float32 holds it exactly: so do dense parts meanwhile."""
        for name, layer in layers.items():
            self.model.set_submodule(name, layer)
        for parameter in self.halves:
            parameter.data = parameter.data.to(halves)


@contextmanager
def trained_factors(model: nn.Module, parts: Sequence[str]) -> Iterator[TrainedFactors]:
    """The factors of a model, which asks for no other gradients inside the context and holds the best ones after it.

    However the context ends, the model has its own layers back, and runs them as it did before.
    """
    ways = {module: module.execution for module in model.modules() if isinstance(module, FactorizedLinear)}
    try:
        for layer in ways:
            layer.use_(None)  # no second form of a weight that is going to change
        with frozen(model):
            factors = TrainedFactors(model, parts)
            try:
                yield factors
            finally:
                factors.finish_()
    finally:
        for layer, way in ways.items():
            layer.use_(way)
