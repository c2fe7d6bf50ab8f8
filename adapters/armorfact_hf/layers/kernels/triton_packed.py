"""The product with a packed 2:4 core on a GPU for a few tokens, where cuSPARSELt loses to the dense product.

Below some 64 tokens a product is bound by reading the weight. The packed core is 9/16 of the dense one in 16 bits
(17/32 in float32), and the kernels of `triton_kernels` read nothing else of it: values and positions meet in registers.
Triton is imported by the first call, so this file imports without it.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from armorfact_hf.layers.kernels.blocks import block_product
from armorfact_hf.layers.kernels.triton_source import kernels_for

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Two programs for each of the 132 multiprocessors of an H100. One number for all GPUs: the same sums on each of them.
PROGRAMS = 264
MOST_TOKENS_A_TILE = 64
# Rows and groups of a tile for one token: 8 KB of 16-bit values, and a quarter of that of x.
ONE_TOKEN_TILE = (8, 256)
# Bytes of a block of B that a program may hold beside its tiles in the shared memory of any recent GPU.
MOST_BLOCK_BYTES = 32768
MOST_FUSED_ROW_TILES = 8


@dataclass(frozen=True)
class Tiling:
    """How `some_tokens` is cut: ``out`` rows, ``tokens`` and ``groups`` a tile; the groups of a row in ``parts``."""

    out: int
    tokens: int
    groups: int
    parts: int
    groups_a_part: int


def packed_product(x: Tensor, values: Tensor, positions: Tensor, right: Tensor | None = None) -> Tensor:
    """y = C x, or C (B x), for the rows of x and a packed 2:4 core C (d_out, d_in), summed in float32.

    The same arguments give the same bits at every call: partial sums are added in a fixed order.

    Args:
        x: (tokens, d_in) float16, bfloat16 or float32, any strides; d_in is a multiple of 4.
        values: (d_out, d_in / 2) in the dtype of x or int8, the kept values of each row from left to right.
        positions: (d_out, ceil(d_in / 8)) uint8, 2 bits for each kept value, the first in the low bits of its byte,
            as in `armorfact.Core.packed`.
        right: (d_in / b, b, b) in the dtype of x, the blocks of B, or None.

    Returns:
        (tokens, d_out) in the dtype of x.

    Raises:
        ValueError: shapes or dtypes other than these, or tensors that are not on a GPU.
        ImportError: triton is not installed.
    """
    check(x, values, positions, right)
    kernels = kernels_for(x)
    if not x.shape[0] * values.shape[0]:
        return x.new_empty(x.shape[0], values.shape[0])
    fused = right is not None and fuses_right(x.shape[0], values.shape[0], right.shape[-1], x.element_size())
    if right is not None and not fused:
        x = block_product(right, x)
    x = x if x.stride(1) == 1 else x.contiguous()
    # Triton launches on the current device, which need not be that of a layer of a model spread over several.
    with torch.cuda.device_of(x):
        if x.shape[0] == 1 and not fused:
            return _one_token(kernels, x, values.contiguous(), positions.contiguous())
        blocks = right.contiguous() if fused else None
        return _some_tokens(kernels, x, values.contiguous(), positions.contiguous(), blocks)


def fuses_right(tokens: int, d_out: int, block: int, element_size: int) -> bool:
    """Whether B x is computed inside the kernel of the core, instead of by a batched product before it.

    Fusing saves one launch and a pass over x, but every tile of rows computes B x anew and reads all of B for it. So
    only where there are few such tiles, and one tile of tokens. A block must be a tile: a power of two from 16 on,
    of at most 32 KB. The limits are reasoned, not measured yet.
    """
    if (
        tokens > MOST_TOKENS_A_TILE
        or block < 16
        or block & (block - 1)
        or block * block * element_size > MOST_BLOCK_BYTES
    ):
        return False
    return _tiles(d_out, rows_a_tile(tokens_a_tile(tokens))) <= MOST_FUSED_ROW_TILES


def tiling(tokens: int, d_out: int, groups: int, element_size: int, block: int | None = None) -> Tiling:
    """How the product of a core (d_out, 4 * groups) with so many tokens is cut.

    - Tokens a tile: the power of two that holds them all, from 16 (the least that a tensor core takes) to 64.
    - Rows a tile: as many as tokens, at least 32. Each tile of rows reads x again, from the cache; so it reads at most
      twice as much of that as of the core.
    - Columns a tile: 128 in 16 bits and 64 in float32, or ``block`` (the size of the blocks of B) where B is fused.
    - Parts: as many as it takes to start `PROGRAMS` programs, each of one tile or more. They are added afterwards.

    The numbers are reasoned, not measured yet.
    """
    token_tile = tokens_a_tile(tokens)
    row_tile = rows_a_tile(token_tile)
    group_tile = (256 // element_size if block is None else block) // 4
    group_tiles = _tiles(groups, group_tile)
    programs = _tiles(d_out, row_tile) * _tiles(tokens, token_tile)
    tiles_a_part = _tiles(group_tiles, _tiles(PROGRAMS, programs))
    return Tiling(row_tile, token_tile, group_tile, _tiles(group_tiles, tiles_a_part), tiles_a_part * group_tile)


def tokens_a_tile(tokens: int) -> int:
    """See `tiling`."""
    return min(max(16, 1 << (tokens - 1).bit_length()), MOST_TOKENS_A_TILE)


def rows_a_tile(token_tile: int) -> int:
    """See `tiling`."""
    return max(32, token_tile)


def _tiles(count: int, size: int) -> int:
    return -(-count // size)


def _one_token(kernels: ModuleType, x: Tensor, values: Tensor, positions: Tensor) -> Tensor:
    d_out = values.shape[0]
    out, groups = ONE_TOKEN_TILE
    y = x.new_empty(1, d_out)
    kernels.one_token[(_tiles(d_out, out),)](
        x, values, positions, y, d_out, x.shape[1] // 4, positions.shape[1], OUT=out, GROUPS=groups, num_warps=4
    )
    return y


def _some_tokens(kernels: ModuleType, x: Tensor, values: Tensor, positions: Tensor, blocks: Tensor | None) -> Tensor:
    (tokens, d_in), d_out = x.shape, values.shape[0]
    cut = tiling(tokens, d_out, d_in // 4, x.element_size(), None if blocks is None else blocks.shape[-1])
    y = x.new_empty(cut.parts, tokens, d_out, dtype=x.dtype if cut.parts == 1 else torch.float32)
    kernels.some_tokens[(_tiles(d_out, cut.out), _tiles(tokens, cut.tokens), cut.parts)](
        x,
        values,
        positions,
        blocks,
        y,
        tokens,
        d_out,
        d_in // 4,
        positions.shape[1],
        cut.groups_a_part,
        x.stride(0),
        OUT=cut.out,
        TOKENS=cut.tokens,
        GROUPS=cut.groups,
        FUSE_RIGHT=blocks is not None,
        # A fused block fills the registers of four warps, and the shared memory that loading ahead takes.
        num_warps=4 if blocks is None else 8,
        num_stages=3 if blocks is None else 1,
    )
    return y[0] if cut.parts == 1 else y.sum(0).to(x.dtype)


def check(x: Tensor, values: Tensor, positions: Tensor, right: Tensor | None) -> None:
    """Raise ValueError for arguments of `packed_product` that do not fit each other."""
    if x.ndim != 2 or x.shape[1] % 4 or x.dtype not in DTYPES:
        raise ValueError(
            "expected x (tokens, d_in) in float16, bfloat16 or float32 with d_in a multiple of 4, "
            f"got {tuple(x.shape)} in {x.dtype}"
        )
    d_in, d_out = x.shape[1], values.shape[0]
    kept = torch.int8 if values.dtype == torch.int8 else x.dtype
    expected = {"values": (values, (d_out, d_in // 2), kept)}
    expected["positions"] = (positions, (d_out, _tiles(d_in, 8)), torch.uint8)
    if right is not None:
        size = right.shape[-1]
        expected["right"] = (right, (d_in // max(size, 1), size, size), x.dtype)
    for name, (tensor, shape, dtype) in expected.items():
        if tensor.shape != shape or tensor.dtype != dtype:
            raise ValueError(f"expected {name} {shape} in {dtype}, got {tuple(tensor.shape)} in {tensor.dtype}")
    if right is not None and right.numel() != d_in * right.shape[-1]:
        raise ValueError(f"expected blocks whose size divides d_in = {d_in}, got {right.shape[-1]}")
