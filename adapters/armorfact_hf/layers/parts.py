"""The tensors of a pruned layer, as they are saved."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from armorfact import BlockDiagonal

PARTS = ("values", "positions", "left", "right", "left_scales", "right_scales", "bias")


def put_empty_(
    module: nn.Module,
    part: str,
    shape: tuple[int, ...] | None,
    whole: torch.dtype | None,
    dtype: torch.dtype | None,
    device: Any,
) -> None:
    """Give a module a tensor of zeros: a buffer of whole numbers, or a parameter that asks for no gradient.

    Args:
        shape: None for None in its place. whole: the dtype of whole numbers, or None for ``dtype``.
    """
    if whole is not None:
        module.register_buffer(part, None if shape is None else torch.zeros(shape, dtype=whole, device=device))
        return
    empty = None if shape is None else torch.zeros(shape, dtype=dtype, device=device)
    module.register_parameter(part, None if empty is None else nn.Parameter(empty, requires_grad=False))


def name_of(dtype: torch.dtype | None, floating: torch.dtype | None) -> str | None:
    """The name of a dtype that is another than the floating one, such as "int8"."""
    return None if dtype in (None, floating) else str(dtype).removeprefix("torch.")


def wrapper(blocks: Tensor, scales: Tensor | None) -> BlockDiagonal:
    """A or B, of its blocks and, where these are whole numbers, its scales (2, channels)."""
    blocks = blocks.detach()
    return BlockDiagonal(blocks, *(() if scales is None else scales.detach().view(2, *blocks.shape[:2])))


def scales_of(side: BlockDiagonal) -> Tensor | None:
    """The scales of A or B, (2, channels), those of rows first; None without."""
    if side.rows is None or side.columns is None:
        return None
    return torch.stack([side.rows, side.columns]).flatten(1)
