"""Several pruned layers that are given the same input, run as one: a server's fused projections."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from armorfact_hf.layers import operators as operators  # registers what `run` is
from armorfact_hf.layers.linear import FactorizedLinear

run = torch.ops.armorfact.factorized_linears.default


class JoinedLinears(nn.ModuleList):
    """The outputs of several `FactorizedLinear`, side by side: y (..., the sum of their d_out) for x (..., d_in).

    A few tokens on a CPU take one launch of the packed kernel, where each layer by itself takes one. For inference:
    no gradients pass.

    Args:
        layers: `FactorizedLinear` of the same d_in, pattern, dtype and device, without biases.

    Raises:
        ValueError: layers that differ in one of these, or have biases.
    """

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        if (reason := refusal(layers)) is not None:
            raise ValueError(f"these layers cannot run as one: {reason}; call one after the other")
        super().__init__(layers)
        self.pattern = cast(FactorizedLinear, layers[0]).pattern

    def forward(self, x: Tensor) -> Tensor:
        """y; the strategies are those that each layer would take by itself."""
        layers = cast(list[FactorizedLinear], list(self._modules.values()))
        factors, choices = [tensor for layer in layers for tensor in layer.tensors], [layer.choice for layer in layers]
        y = run(x.reshape(-1, x.shape[-1]), factors, self.pattern.keep, self.pattern.group, choices)
        return y.view(*x.shape[:-1], y.shape[-1])


def refusal(layers: Sequence[nn.Module]) -> str | None:
    """Why layers cannot run as one; None if they can."""
    if not layers or not all(isinstance(layer, FactorizedLinear) for layer in layers):
        return "not all of them are pruned"
    if any(layer.bias is not None for layer in layers):
        return "some have biases of their own"
    alike = {(x.in_features, x.pattern, x.values.dtype, x.values.device) for x in layers}
    return None if len(alike) == 1 else "they differ in their inputs, pattern, dtype or device"
