"""The one operator of PyTorch that a pruned layer calls.

    armorfact::factorized_linear   y = x (A C B)', by the strategy that the number of tokens leads to

`torch.compile` and servers trace a model once, at one number of tokens, and may run what they traced at any other. So
the choice is made inside, at every call, and a graph holds the rule for it, as text. The operator is no part of
autograd: `FactorizedLinear` takes another way where gradients are asked for.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from armorfact import Pattern
from armorfact_hf.layers.execution import STRATEGIES, Execution, default_execution
from armorfact_hf.layers.strategy import Kind, Operands

_library = torch.library.Library("armorfact", "DEF")
_library.define(
    "factorized_linear(Tensor x, Tensor values, Tensor positions, Tensor? left, Tensor? right, Tensor? merged, "
    "Tensor? compressed, int keep, int group, str execution) -> Tensor"
)


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
) -> Tensor:
    """x (tokens, d_in), and `Operands`; ``execution`` is the text of an `Execution`, or empty for the default one."""
    tokens, d_in = x.shape
    pattern, chosen = _chosen(execution, keep, group, values.shape[0], d_in, values.dtype, values.device)
    operands = Operands(values, positions, left, right, pattern, d_in, merged, compressed)
    return STRATEGIES[chosen.at(tokens)].product(x, operands)


@cache
def _chosen(
    execution: str, keep: int, group: int, d_out: int, d_in: int, dtype: torch.dtype, device: torch.device
) -> tuple[Pattern, Execution]:
    pattern = Pattern(keep, group)
    if execution:
        return pattern, Execution.parse(execution)
    return pattern, default_execution(Kind((d_out, d_in), pattern, dtype, device))


def _fake_factorized_linear(x: Tensor, values: Tensor, *rest: object) -> Tensor:
    return x.new_empty(x.shape[0], values.shape[0])


_library.impl("factorized_linear", _factorized_linear, "CompositeExplicitAutograd")
torch.library.register_fake("armorfact::factorized_linear", _fake_factorized_linear, lib=_library)
