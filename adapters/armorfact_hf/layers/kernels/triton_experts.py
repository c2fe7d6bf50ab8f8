"""The product of experts' packed 2:4 layers on a GPU, those of all experts in one launch.

The rows of x are those of the first expert, then those of the next, and so on. They are cut into tiles of which each
belongs to one expert; a table names the expert and the rows of every tile, and a program looks up its own. Wrappers are
launches of their own: three for a projection, whatever the number of experts. None of it has run on a GPU yet.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from armorfact_hf.layers.kernels.triton_packed import check, rows_a_tile, tokens_a_tile
from armorfact_hf.layers.kernels.triton_source import kernels_for

COLUMN_BYTES = 256  # of a row of the core in a tile, zeros included, as in `triton_packed.tiling`
MOST_BLOCK = 64  # rows and columns of a wrapper's block in a tile


def product(
    x: Tensor,
    counts: Sequence[int],
    values: Tensor,
    positions: Tensor,
    left: Tensor | None = None,
    right: Tensor | None = None,
) -> Tensor:
    """y = A C B x, each row by the factors of its expert, summed in float32.

    Args:
        x: (rows, d_in) float16, bfloat16 or float32, the rows of one expert after those of another.
        counts: how many rows each expert has, of all the rows.
        values, positions, right: as for `triton_packed.packed_product`, with the experts as the first dimension.
        left: (experts, d_out / b, b, b) in the dtype of x, the blocks of A, or None.

    Returns:
        (rows, d_out) in the dtype of x.

    Raises:
        ValueError: shapes or dtypes other than these, or tensors that are not on a GPU.
        ImportError: triton is not installed.
    """
    _check(x, counts, values, positions, left, right)
    kernels = kernels_for(x)
    if not x.shape[0]:
        return x.new_empty(0, values.shape[1])
    size = tokens_a_tile(max(counts))
    tiles = torch.from_numpy(tiles_of(counts, size)).to(x.device)
    with torch.cuda.device_of(x):
        x = x.contiguous() if right is None else _blocks(kernels, x.contiguous(), right, tiles, size)
        y = _cores(kernels, x, values.contiguous(), positions.contiguous(), tiles, size)
        return y if left is None else _blocks(kernels, y, left, tiles, size)


def tiles_of(counts: Sequence[int], size: int) -> np.ndarray:
    """(tiles, 3) int32: the expert of each tile, its first row, and the row behind the last one of that expert.

    Args:
        counts: how many rows each expert has. size: the rows of a tile; an expert's last one may have less.
    """
    tokens = np.asarray(counts)
    tiles = -(-tokens // size)
    expert = np.repeat(np.arange(len(tokens)), tiles)
    number = np.arange(tiles.sum()) - np.repeat(np.cumsum(tiles) - tiles, tiles)  # of a tile among its expert's
    ends = np.cumsum(tokens)
    first = (ends - tokens)[expert] + number * size
    return np.stack([expert, first, ends[expert]], axis=1).astype(np.int32)


def _cores(kernels: ModuleType, x: Tensor, values: Tensor, positions: Tensor, tiles: Tensor, size: int) -> Tensor:
    (rows, d_in), d_out = x.shape, values.shape[1]
    out = rows_a_tile(size)
    y = x.new_empty(rows, d_out)
    kernels.expert_cores[(-(-d_out // out), len(tiles))](
        x,
        values,
        positions,
        y,
        tiles,
        d_out,
        d_in // 4,
        positions.shape[2],
        OUT=out,
        TOKENS=size,
        GROUPS=COLUMN_BYTES // x.element_size() // 4,
        num_warps=4,
    )
    return y


def _blocks(kernels: ModuleType, x: Tensor, blocks: Tensor, tiles: Tensor, size: int) -> Tensor:
    block, width = blocks.shape[-1], x.shape[1]
    side = min(max(16, 1 << (block - 1).bit_length()), MOST_BLOCK)
    y = torch.empty_like(x)
    kernels.expert_blocks[(width // block * -(-block // side), len(tiles))](
        x, blocks.contiguous(), y, tiles, width, block, OUT=side, TOKENS=size, INNER=side, num_warps=4
    )
    return y


def _check(
    x: Tensor, counts: Sequence[int], values: Tensor, positions: Tensor, left: Tensor | None, right: Tensor | None
) -> None:
    stacks = {"values": values, "positions": positions, "left": left, "right": right}
    for name, stack in stacks.items():
        if stack is not None and (stack.ndim < 3 or len(stack) != len(counts)):
            raise ValueError(f"expected {name} of {len(counts)} experts, as there are counts, got {tuple(stack.shape)}")
    if sum(counts) != len(x):
        raise ValueError(f"expected {len(x)} rows in all, as x has, got counts of {sum(counts)}")
    check(x, values[0], positions[0], None if right is None else right[0])
    d_out, size = values.shape[1], 1 if left is None else left.shape[-1]
    expected = (len(counts), d_out // max(size, 1), size, size)
    if left is not None and (left.shape != expected or d_out % size or left.dtype != x.dtype):
        raise ValueError(f"expected left {expected} in {x.dtype}, got {tuple(left.shape)} in {left.dtype}")
