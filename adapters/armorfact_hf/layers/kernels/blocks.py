"""The product with a wrapper, a block diagonal matrix."""

from __future__ import annotations

import torch
from torch import Tensor


def block_product(blocks: Tensor, x: Tensor) -> Tensor:
    """diag(blocks) applied to every row of x (tokens, blocks * size): (tokens, blocks * size)."""
    count, size, _ = blocks.shape
    rows = x.view(x.shape[0], count, size).transpose(0, 1)
    return torch.bmm(rows, blocks.transpose(1, 2)).transpose(0, 1).reshape(x.shape[0], count * size)
