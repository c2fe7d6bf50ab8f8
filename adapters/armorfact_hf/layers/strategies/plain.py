"""PyTorch's own operators on the weight A C B, formed anew: they know gradients and autocast; right, and slower.

Nobody chooses it: it runs where a gradient is asked for or dtypes differ, whatever was chosen, and the number of tokens
plays no part, so that a graph that is traced with gradients holds for any number.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from armorfact_hf.layers.strategies.strategy import Operands


def product(x: Tensor, operands: Operands) -> Tensor:
    """y = (A C B) x; x may be of another dtype under autocast.

    The weight is formed and multiplied with once: whoever asks for gradients has many tokens, and the way back through
    three products would keep two more activations.
    """
    return functional.linear(x, _weight(operands.widened))


def _weight(operands: Operands) -> Tensor:
    """A C B, (d_out, d_in)."""
    core, left, right = _dense_core(operands), operands.left, operands.right
    if left is None or right is None:
        return core
    d_out, d_in = core.shape
    right_done = torch.einsum("rjk,jkc->rjc", core.view(d_out, *right.shape[:2]), right)
    return torch.bmm(left, right_done.reshape(*left.shape[:2], d_in)).view(d_out, d_in)


def _dense_core(operands: Operands) -> Tensor:
    """`armorfact.Core.dense` in nothing but PyTorch's operators, which a compiler follows from end to end."""
    values, (keep, group) = operands.values.to(operands.dtype), (operands.pattern.keep, operands.pattern.group)
    bits, device = operands.pattern.index_bits, values.device
    (d_out, kept), d_in = values.shape, operands.columns
    codes = operands.positions[..., None] >> torch.arange(0, 8, bits, dtype=torch.uint8, device=device)
    positions = (codes & (1 << bits) - 1).view(d_out, -1)[:, :kept]
    columns = positions + torch.arange(0, d_in, group, device=device).repeat_interleave(keep)
    return values.new_zeros(d_out, d_in).scatter(1, columns, values)
