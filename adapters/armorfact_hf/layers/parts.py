"""The tensors of a pruned layer, as they are saved."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from armorfact import BlockDiagonal
from armorfact_hf.layers.format import dtype_name

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
    return None if dtype in (None, floating) else dtype_name(dtype)


def wrapper(blocks: Tensor, scales: Tensor | None) -> BlockDiagonal:
    """A or B, of its blocks and, where these are whole numbers, its scales (2, channels)."""
    blocks = blocks.detach()
    return BlockDiagonal(blocks, *(() if scales is None else scales.detach().view(2, *blocks.shape[:2])))


def scales_of(side: BlockDiagonal) -> Tensor | None:
    """The scales of A or B in int8, (2, channels), those of rows first and ones for None; None for floating blocks.

    Raises:
        ValueError: scales of floating blocks.
    """
    given = side.rows, side.columns
    if side.blocks.dtype.is_floating_point:
        if given != (None, None):
            raise ValueError("expected scales of int8 blocks only: multiply those of floating blocks in, by `scaled`")
        return None
    dtype = torch.get_default_dtype() if given == (None, None) else side.dtype
    ones = torch.ones(side.blocks.shape[:2], dtype=dtype, device=side.blocks.device)
    return torch.stack([ones if scales is None else scales for scales in given]).flatten(1)


def is_cast(x: Tensor) -> bool:
    """Whether autocast takes x in its own dtype, as PyTorch's products do."""
    cast = x.is_floating_point() and x.dtype != torch.float64
    return cast and not x.is_meta and torch.is_autocast_enabled(x.device.type)


def in_forward_mode() -> bool:
    """Whether derivatives are carried along, of which no `requires_grad` tells."""
    return forward_ad._current_level >= 0


class StoredParts(nn.Module):
    """A module of `PARTS`, which loads whole numbers for the same whole numbers and floating ones for floating ones.

    PyTorch would cut values to integers, most of them to 0, and say that all is well.
    """

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, local: Any, strict: bool, *rest: Any
    ) -> None:
        held = {part: (getattr(self, part, None), state_dict.get(prefix + part)) for part in PARTS}
        wrong = [
            f"{prefix}{part} is stored in {given.dtype}, and the module holds {own.dtype}: make one that is stored so"
            for part, (own, given) in held.items()
            if own is not None and isinstance(given, Tensor) and not _stands_for(given, own)
        ]
        *_, errors = rest
        errors += wrong
        if not wrong:
            super()._load_from_state_dict(state_dict, prefix, local, strict, *rest)


def _stands_for(given: Tensor, own: Tensor) -> bool:
    return given.is_floating_point() if own.is_floating_point() else given.dtype == own.dtype
