"""Writes the core with its zeros for the time of one product: any pattern, any device, many tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from armorfact import Core
from armorfact_hf.layers.kernels.cpu_packed import DTYPES, core_with_zeros
from armorfact_hf.layers.strategies.strategy import PAIR, Kind, Operands

# Bytes of the core that are unpacked at a time: an allocator hands such a piece out again without clearing it anew.
UNPACKED_BYTES = 1 << 22


def refusal(kind: Kind) -> str | None:
    """Nothing is refused."""
    return None


def prepare(operands: Operands) -> dict[str, Tensor]:
    """Nothing."""
    return {}


def product(x: Tensor, operands: Operands) -> Tensor:
    """y = A (C (B x))."""
    return operands.widened.between_wrappers(x, lambda inputs: _core_product(inputs, operands.core))


def _core_product(x: Tensor, core: Core) -> Tensor:
    """A panel of rows at a time, so that the core with its zeros never stands in memory as a whole."""
    d_out, d_in = core.values.shape[0], core.columns
    rows = max(1, UNPACKED_BYTES // (d_in * x.element_size()))
    if rows >= d_out:
        return x @ _rows(core, 0, d_out, x.dtype).T
    y = x.new_empty(x.shape[0], d_out)
    for first in range(0, d_out, rows):
        panel = _rows(core, first, min(first + rows, d_out), x.dtype)
        y[:, first : first + rows] = x @ panel.T
    return y


def _rows(core: Core, first: int, end: int, dtype: torch.dtype) -> Tensor:
    """Rows first..end of a core in ``dtype``, with their zeros."""
    values, packed = core.values[first:end].to(dtype), core.packed[first:end]
    if core.pattern == PAIR and values.device.type == "cpu" and dtype in DTYPES:
        return core_with_zeros(values, packed)
    return Core(values, packed, core.pattern, core.columns).dense()
