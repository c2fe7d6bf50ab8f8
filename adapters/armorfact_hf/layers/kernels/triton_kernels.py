"""The Triton kernels that multiply with packed 2:4 cores; `triton_packed` and `triton_experts` launch them.

Importing this file needs triton. A group is four columns, of which the core keeps two: the values v0 and v1, at the
positions p0 < p1. Two groups share a byte of positions. Values may be int8, which any dtype of x holds exactly. Sums
are float32 whatever the dtype of the tensors.
"""

import triton
import triton.language as tl


@triton.jit
def _groups(values, positions, rows, first, d_out, groups, bytes_a_row, OUT: tl.constexpr, GROUPS: tl.constexpr):
    """v0, v1, p0, p1, each (OUT, GROUPS), of the groups from ``first`` on; v0 = v1 = 0 outside of the core.

    Values and bytes are loaded side by side as they lie, since that moves 16 bytes a load, and split in registers.
    """
    inside = (rows < d_out)[:, None]
    kept = 2 * first + tl.arange(0, 2 * GROUPS)
    # 64 bits, as a large vocabulary times a wide model passes 2^31.
    value_at = values + rows.to(tl.int64)[:, None] * (2 * groups) + kept[None, :]
    pairs = tl.load(value_at, mask=inside & (kept < 2 * groups)[None, :], other=0.0)
    v0, v1 = tl.split(tl.reshape(pairs, (OUT, GROUPS, 2)))

    byte = first // 2 + tl.arange(0, GROUPS // 2)
    byte_at = positions + rows.to(tl.int64)[:, None] * bytes_a_row + byte[None, :]
    codes = tl.load(byte_at, mask=inside & (byte < bytes_a_row)[None, :], other=0)
    codes = tl.reshape(tl.join(codes & 15, codes >> 4), (OUT, GROUPS))
    return v0, v1, codes & 3, codes >> 2


@triton.jit
def _plane(v0, v1, p0, p1, COLUMN: tl.constexpr):
    """Column COLUMN of every group, zeros included."""
    zero = tl.full(v0.shape, 0, v0.dtype)
    return tl.where(p1 == COLUMN, v1, tl.where(p0 == COLUMN, v0, zero))


@triton.jit
def _dense(v0, v1, p0, p1, OUT: tl.constexpr, GROUPS: tl.constexpr):
    """The tile of the core with its zeros, (OUT, 4 * GROUPS)."""
    even = tl.join(_plane(v0, v1, p0, p1, 0), _plane(v0, v1, p0, p1, 2))
    odd = tl.join(_plane(v0, v1, p0, p1, 1), _plane(v0, v1, p0, p1, 3))
    return tl.reshape(tl.join(even, odd), (OUT, 4 * GROUPS))


@triton.jit
def _pick(p, x0, x1, x2, x3):
    """The input that a kept value at position p multiplies, in float32."""
    odd = (p & 1) != 0
    return tl.where(p >= 2, tl.where(odd, x3, x2), tl.where(odd, x1, x0)).to(tl.float32)


INTERPRETED = tl.constexpr(not isinstance(_pick, triton.JITFunction))


@triton.jit
def _dot(a, b):
    """a @ b in float32."""
    if INTERPRETED:  # whose own product takes bfloat16 for integers
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    # "ieee": float32 weights are not cut to the 10 bits of TF32.
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def one_token(x, values, positions, y, d_out, groups, bytes_a_row, OUT: tl.constexpr, GROUPS: tl.constexpr):
    """y = C x for one token: x (4 * groups,), y (d_out,). Grid (ceil(d_out / OUT),).

    Every lane keeps its own sum over the tiles of its rows; the lanes are added once, at the end.
    """
    rows = tl.program_id(0) * OUT + tl.arange(0, OUT)
    total = tl.full((OUT, GROUPS), 0, tl.float32)
    for first in range(0, groups, GROUPS):
        v0, v1, p0, p1 = _groups(values, positions, rows, first, d_out, groups, bytes_a_row, OUT, GROUPS)
        column = 4 * first + tl.arange(0, 4 * GROUPS)
        inputs = tl.load(x + column, mask=column < 4 * groups, other=0.0)
        even, odd = tl.split(tl.reshape(inputs, (1, GROUPS, 2, 2)))
        x0, x2 = tl.split(even)
        x1, x3 = tl.split(odd)
        total += v0.to(tl.float32) * _pick(p0, x0, x1, x2, x3)
        total += v1.to(tl.float32) * _pick(p1, x0, x1, x2, x3)
    tl.store(y + rows, tl.sum(total, axis=1).to(y.dtype.element_ty), mask=rows < d_out)


@triton.jit
def _tile(
    x,
    values,
    positions,
    right,
    rows,
    token,
    tokens,
    start,
    stop,
    d_out,
    groups,
    bytes_a_row,
    x_stride,
    OUT: tl.constexpr,
    TOKENS: tl.constexpr,
    GROUPS: tl.constexpr,
    FUSE_RIGHT: tl.constexpr,
):
    """Rows of C x, or of C B x, for some tokens, over the groups start..stop: (OUT, TOKENS); 0 for token >= tokens."""
    COLUMNS: tl.constexpr = 4 * GROUPS
    total = tl.full((OUT, TOKENS), 0, tl.float32)
    for first in range(start, stop, GROUPS):
        column = 4 * first + tl.arange(0, COLUMNS)
        inside = (column < 4 * groups)[:, None] & (token < tokens)[None, :]
        inputs = tl.load(x + token[None, :] * x_stride + column[:, None], mask=inside, other=0.0)
        if FUSE_RIGHT:
            block = tl.load(right + column[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :])
            inputs = _dot(block, inputs).to(x.dtype.element_ty)
        v0, v1, p0, p1 = _groups(values, positions, rows, first, d_out, groups, bytes_a_row, OUT, GROUPS)
        weights = _dense(v0, v1, p0, p1, OUT, GROUPS)
        if weights.dtype == tl.int8:
            weights = weights.to(tl.float32).to(x.dtype.element_ty)
        total += _dot(weights, inputs)
    return total


@triton.jit
def some_tokens(
    x,
    values,
    positions,
    right,
    y,
    tokens,
    d_out,
    groups,
    bytes_a_row,
    groups_a_part,
    x_stride,
    OUT: tl.constexpr,
    TOKENS: tl.constexpr,
    GROUPS: tl.constexpr,
    FUSE_RIGHT: tl.constexpr,
):
    """Part p of C x, or of C B x, over the groups p * groups_a_part and following: y (parts, tokens, d_out).

    x (tokens, 4 * groups) with rows ``x_stride`` apart. Grid (row tiles, token tiles, parts). FUSE_RIGHT multiplies
    each tile of x by its block of B first; one block is then one tile: right (groups / GROUPS, 4 * GROUPS, 4 * GROUPS).
    """
    rows = tl.program_id(0) * OUT + tl.arange(0, OUT)
    token = (tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    start = tl.program_id(2) * groups_a_part
    stop = tl.minimum(start + groups_a_part, groups)
    total = _tile(
        x,
        values,
        positions,
        right,
        rows,
        token,
        tokens,
        start,
        stop,
        d_out,
        groups,
        bytes_a_row,
        x_stride,
        OUT,
        TOKENS,
        GROUPS,
        FUSE_RIGHT,
    )
    y_at = y + (tl.program_id(2).to(tl.int64) * tokens + token[None, :]) * d_out + rows[:, None]
    tl.store(y_at, total.to(y.dtype.element_ty), mask=(rows < d_out)[:, None] & (token < tokens)[None, :])


@triton.jit
def _rows_of_an_expert(tiles, TOKENS: tl.constexpr):
    """The expert that this program works for, its rows of x, and the end of them."""
    tile = tiles + 3 * tl.program_id(1)
    rows = tl.load(tile + 1).to(tl.int64) + tl.arange(0, TOKENS)
    return tl.load(tile).to(tl.int64), rows, tl.load(tile + 2)


@triton.jit
def expert_cores(
    x,
    values,
    positions,
    y,
    tiles,
    d_out,
    groups,
    bytes_a_row,
    OUT: tl.constexpr,
    TOKENS: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """y = C x, each row by the core of its expert: x (rows, 4 * groups), y (rows, d_out). Grid (row tiles, tiles).

    values and positions have the experts first; tiles (tiles, 3) int32, see `triton_experts.tiles_of`.
    """
    expert, token, end = _rows_of_an_expert(tiles, TOKENS)
    rows = tl.program_id(0) * OUT + tl.arange(0, OUT)
    values += expert * d_out * 2 * groups
    positions += expert * d_out * bytes_a_row
    total = _tile(
        x,
        values,
        positions,
        None,
        rows,
        token,
        end,
        0,
        groups,
        d_out,
        groups,
        bytes_a_row,
        4 * groups,
        OUT,
        TOKENS,
        GROUPS,
        False,
    )
    inside = (rows < d_out)[:, None] & (token < end)[None, :]
    tl.store(y + token[None, :] * d_out + rows[:, None], total.to(y.dtype.element_ty), mask=inside)


@triton.jit
def expert_blocks(x, blocks, y, tiles, width, size, OUT: tl.constexpr, TOKENS: tl.constexpr, INNER: tl.constexpr):
    """y = diag(blocks) x, each row by the blocks of its expert: x and y (rows, width), blocks (experts, n, size, size).

    Grid (n * ceil(size / OUT), tiles), n = width / size.
    """
    expert, token, end = _rows_of_an_expert(tiles, TOKENS)
    pieces = (size + OUT - 1) // OUT
    block = tl.program_id(0) // pieces
    row = tl.program_id(0) % pieces * OUT + tl.arange(0, OUT)
    blocks += (expert * (width // size) + block) * size * size
    total = tl.full((OUT, TOKENS), 0, tl.float32)
    for first in range(0, size, INNER):
        column = first + tl.arange(0, INNER)
        weight_inside = (row < size)[:, None] & (column < size)[None, :]
        weight = tl.load(blocks + row[:, None] * size + column[None, :], mask=weight_inside, other=0.0)
        inside = (column < size)[:, None] & (token < end)[None, :]
        at = x + token[None, :] * width + block * size + column[:, None]
        total += _dot(weight, tl.load(at, mask=inside, other=0.0))
    inside = (row < size)[:, None] & (token < end)[None, :]
    tl.store(y + token[None, :] * width + block * size + row[:, None], total.to(y.dtype.element_ty), mask=inside)
