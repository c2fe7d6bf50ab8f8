"""The operators of PyTorch that pruned layers call.

    armorfact::factorized_linear    y = x (A C B)', by the strategy that the number of tokens leads to
    armorfact::factorized_linears   the same of several layers, y side by side; a few tokens go through all at once

`torch.compile` and servers trace a model once, at one number of tokens, and may run what they traced at any other. So
the choice is made inside, at every call, and a graph holds the rule for it, as text. The operators are no part of
autograd: `FactorizedLinear` takes another way where gradients are asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from armorfact import Pattern
from armorfact_hf.layers.execution import STRATEGIES, Execution, default_execution
from armorfact_hf.layers.strategies import packed
from armorfact_hf.layers.strategies.strategy import Kind, Operands

FACTORS = 8  # how many a layer has, see `FactorizedLinear.tensors`
KEPT = {"dense": "merged", "semi_structured": "compressed"}  # what strategies keep beside the factors, in `Operands`

_library = torch.library.Library("armorfact", "DEF")
_library.define(
    "factorized_linear(Tensor x, Tensor values, Tensor positions, Tensor? left, Tensor? right, Tensor? merged, "
    "Tensor? compressed, int keep, int group, str execution, Tensor? left_scales=None, Tensor? right_scales=None) "
    "-> Tensor"
)
_library.define("factorized_linears(Tensor x, Tensor?[] factors, int keep, int group, str[] executions) -> Tensor")


def _factorized_linear(
    x: Tensor,
    values: Tensor,
    positions: Tensor,
    left: Tensor | None,
    right: Tensor | None,
    merged: Tensor | None,
    compressed: Tensor | None,
    keep: int,
    group: int,
    execution: str,
    left_scales: Tensor | None = None,
    right_scales: Tensor | None = None,
) -> Tensor:
    """x (tokens, d_in), and `Operands`; ``execution`` is the text of an `Execution`, or empty for the default one."""
    factors = values, positions, left, right, merged, compressed, left_scales, right_scales
    operands = _operands(factors, _pattern(keep, group), x.shape[1])
    return STRATEGIES[_strategy(x, operands, execution)].product(x, operands)


def _factorized_linears(
    x: Tensor, factors: Sequence[Tensor | None], keep: int, group: int, executions: Sequence[str]
) -> Tensor:
    """x (tokens, d_in), `FactorizedLinear.tensors` of each layer one after another, and its execution."""
    pattern, d_in = _pattern(keep, group), x.shape[1]
    layers = [_operands(factors[at : at + FACTORS], pattern, d_in) for at in range(0, len(factors), FACTORS)]
    strategies = [_strategy(x, layer, text) for layer, text in zip(layers, executions, strict=True)]
    if all(name == "packed" for name in strategies):
        return packed.products(x, layers)
    outputs = [STRATEGIES[name].product(x, layer) for name, layer in zip(strategies, layers, strict=True)]
    return torch.cat(outputs, dim=-1)


_pattern = cache(Pattern)


def _operands(factors: Sequence[Any], pattern: Pattern, d_in: int) -> Operands:
    values, positions, left, right, *beside = factors
    return Operands(values, positions, left, right, pattern, d_in, *beside)


def _strategy(x: Tensor, operands: Operands, execution: str) -> str:
    """The one that was chosen, or by default where what that one keeps is not there any more.

    Another thread may be choosing anew; and a cast through ``.data``, as PEFT makes it, leaves a copy behind.
    """
    held = operands.values
    kind = (held.shape[0], x.shape[1]), operands.pattern, x.dtype, held.device, held.dtype
    name = _chosen(execution, *kind).at(x.shape[0])
    if name in KEPT and not _fits(getattr(operands, KEPT[name]), x):
        return _chosen("", *kind).at(x.shape[0])
    return name


def _fits(kept: Tensor | None, x: Tensor) -> bool:
    return kept is not None and kept.dtype == x.dtype and kept.device == x.device


@cache
def _chosen(execution: str, *kind: Any) -> Execution:
    return Execution.parse(execution) if execution else default_execution(Kind(*kind))


def _fake_factorized_linear(x: Tensor, values: Tensor, *rest: object) -> Tensor:
    return x.new_empty(x.shape[0], values.shape[0])


def _fake_factorized_linears(x: Tensor, factors: Sequence[Tensor | None], *rest: object) -> Tensor:
    return x.new_empty(x.shape[0], sum(values.shape[0] for values in factors[::FACTORS] if values is not None))


for _name, _run, _fake in (
    ("factorized_linear", _factorized_linear, _fake_factorized_linear),
    ("factorized_linears", _factorized_linears, _fake_factorized_linears),
):
    _library.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"armorfact::{_name}", _fake, lib=_library)
