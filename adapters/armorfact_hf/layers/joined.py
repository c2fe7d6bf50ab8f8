"""Several pruned layers that are given the same input, run as one: a server's fused projections."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

from armorfact_hf.layers import operators as operators  # registers what `run` is
from armorfact_hf.layers.execution import default_execution
from armorfact_hf.layers.kernels.cpu_packed import FEW_TOKENS, FewTokens, Stored
from armorfact_hf.layers.linear import FactorizedLinear

Place = tuple[torch.dtype, int, bool] | None  # in memory, of a tensor, and whether it is contiguous there
State = list[tuple[str | Place, ...]]
run = torch.ops.armorfact.factorized_linears.default


class JoinedLinears(nn.ModuleList):
    """The outputs of several `FactorizedLinear`, side by side: y (..., the sum of their d_out) for x (..., d_in).

    A few tokens on a CPU take one launch of the packed kernel, where each layer by itself takes one. Under autocast,
    and where a gradient is asked for, they run one after the other.

    Args:
        layers: `FactorizedLinear` of the same d_in, pattern, dtypes and device, without biases.

    Raises:
        ValueError: layers that differ in one of these, or have biases.
    """

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        if (reason := refusal(layers)) is not None:
            raise ValueError(f"these layers cannot run as one: {reason}; call one after the other")
        super().__init__(layers)
        self.pattern = cast(FactorizedLinear, layers[0]).pattern
        self._prepared: _Prepared | None = None

    def forward(self, x: Tensor) -> Tensor:
        """y; the strategies are those that each layer would take by itself.

        Raises:
            ValueError: as `FactorizedLinear.forward` does.
        """
        layers = cast(list[FactorizedLinear], list(self._modules.values()))
        dtype = layers[0].dtype
        x = layers[0].accepted(x, dtype)
        if x.dtype != dtype or any(layer.passes_gradients(x) for layer in layers) or _is_transformed():
            return torch.cat([layer(x) for layer in layers], dim=-1)
        flat = x.reshape(-1, x.shape[-1])
        if _has_address(flat) and (few := self._few(layers, flat.shape[0])):
            y = few(flat)
        else:
            factors = [tensor for layer in layers for tensor in layer.tensors]
            y = run(flat, factors, self.pattern.keep, self.pattern.group, [layer.choice for layer in layers])
        return y.view(*x.shape[:-1], y.shape[-1])

    def _few(self, layers: list[FactorizedLinear], tokens: int) -> FewTokens | None:
        """The prepared launch for so many tokens, if all layers are for one."""
        if tokens > FEW_TOKENS:
            return None
        state = [(layer.choice, *map(_place, layer.tensors)) for layer in layers]
        if self._prepared is None or self._prepared.state != state:
            self._prepared = _Prepared.of(layers, state)
        return self._prepared.launch if tokens in self._prepared.tokens else None

    def __getstate__(self) -> dict[str, object]:
        return {**super().__getstate__(), "_prepared": None}  # it holds addresses in this process

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> JoinedLinears:
        self._prepared = None  # it would keep the factors of before in memory
        return super()._apply(fn, recurse)


def _is_transformed() -> bool:
    """Whether `torch.func.vmap` or its kin, or `torch.jit.trace`, is at work: they know operators of one layer only."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._functorch.maybe_current_level() is not None or torch.jit.is_tracing()


def _has_address(x: Tensor) -> bool:
    """Whether a kernel may read x: it is on a CPU, and nobody traces what is computed."""
    traced = torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None
    return x.device.type == "cpu" and type(x) is Tensor and not traced


def _place(tensor: Tensor | None) -> Place:
    return None if tensor is None else (tensor.dtype, tensor.data_ptr(), tensor.is_contiguous())


class _Prepared(NamedTuple):
    """A launch, the numbers of tokens that it is right for, and the choices and places that it was made for."""

    launch: FewTokens | None
    tokens: frozenset[int]
    state: State

    @classmethod
    def of(cls, layers: list[FactorizedLinear], state: State) -> _Prepared:
        executions = [layer.execution or default_execution(layer.kind) for layer in layers]
        numbers = range(FEW_TOKENS + 1) if _all_contiguous(state) else ()  # of copies the launch would miss a change
        packed = [n for n in numbers if all(each.at(n) == "packed" for each in executions)]
        factors = [_stored(layer.tensors) for layer in layers]
        return cls(FewTokens(factors) if packed else None, frozenset(packed), state)


def _all_contiguous(state: State) -> bool:
    return all(place is None or place[2] for _, *places in state for place in cast(list[Place], places))


def _stored(tensors: Sequence[Tensor | None]) -> Stored:
    """The factors of a layer as a launch takes them, of `FactorizedLinear.tensors`."""
    found = [tensor if tensor is None else tensor.detach() for tensor in tensors]
    return cast(Stored, (*found[:4], *found[6:]))


def refusal(layers: Sequence[nn.Module]) -> str | None:
    """Why layers cannot run as one; None if they can."""
    if not layers or not all(isinstance(layer, FactorizedLinear) for layer in layers):
        return "not all of them are pruned"
    if any(layer.bias is not None for layer in layers):
        return "some have biases of their own"
    alike = {
        (x.in_features, x.pattern, x.dtype, x.layout.core_dtype, x.layout.wrapper_dtype, x.values.device)
        for x in cast(Sequence[FactorizedLinear], layers)
    }
    return None if len(alike) == 1 else "they differ in their inputs, pattern, dtypes or device"
