"""The compiled CPU product of packed 2:4 layers in bfloat16 with many tokens, which stand side by side in a vector.

A group of four columns keeps two values, in one of six ways. So a panel of inputs holds, for each group, the six pairs
of columns that there are, for all tokens of a tile; a row of the core multiplies its pair of kept values with one of
them. That is half the multiplications of a dense product, and nothing has to be picked out inside a vector. The
wrappers' blocks are multiplied in the same form, with the pairs of columns as they stand. See `bf16`.
"""

from __future__ import annotations

import numpy as np
from numba import carray, prange

from armorfact.arrays.compiled import compiled
from armorfact_hf.layers.kernels.bf16 import (
    add_products,
    load_pairs,
    spread_pair,
    store_pairs,
    store_rounded,
    take_turns,
    transpose_pairs,
)
from armorfact_hf.layers.kernels.cpu import BYTES
from armorfact_hf.layers.kernels.simd import load, pointer, prefetch, store, zeros

# Tokens that stand side by side: four vectors, so that a row's pair of values serves four products.
TILE = 64
# Columns of a panel: 24 KiB, which stay in the nearest cache while row after row takes from them.
COLUMNS = 64
# The six pairs of columns that a group may keep, and which of them four bits of positions say, four bits for each.
PAIRS = ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))
PAIR_OF_CODE = np.uint64(sum(pair << 4 * (low | high << 2) for pair, (low, high) in enumerate(PAIRS)))


@compiled(parallel=True, nogil=True)
def tile_rows(like, x, y, rows, d_in, width, most, parts):
    """y = A C B x of every part, on its rows of x and into its columns of y, in two parallel passes: B, then C and A.

    Args:
        like, x, y, rows, d_in, width, parts: as for `cpu_experts.expert_rows`, in bfloat16; no part with more tokens
            than `TILE`.
        most: rows of a core that a thread takes at a time, about.
    """
    y = carray(pointer(y, like), rows * width)
    inputs = _right_products(like, carray(pointer(x, like), rows * d_in), d_in, parts)
    ends = np.empty(parts.shape[0], dtype=np.int64)  # of each part's pieces of rows
    pieces = 0
    for p in range(parts.shape[0]):
        pieces += -(-parts[p, 4] // _piece(parts[p, 5], most))
        ends[p] = pieces
    for i in prange(pieces):
        p = np.searchsorted(ends, i, side="right")
        d_out, size, piece = parts[p, 4], parts[p, 5], _piece(parts[p, 5], most)
        first, tokens, column = parts[p, 7], parts[p, 8], parts[p, 9]
        row = (i - (ends[p] + -d_out // piece)) * piece
        here = min(piece, d_out - row)
        values = carray(pointer(parts[p, 0], like), d_out * (d_in // 2))
        positions = carray(pointer(parts[p, 1], BYTES), d_out * ((d_in + 7) // 8))
        z, rounded = np.zeros(here * TILE, dtype=np.float32), _aligned(here * TILE)
        _core(values, positions, row, here, d_in, inputs[p * d_in * TILE : (p + 1) * d_in * TILE], z)
        _round(z, rounded)
        if size:
            left = carray(pointer(parts[p, 2], like), d_out * size)
            for r in range(0, here, size):
                block_rows = rounded[r * TILE : (r + size) * TILE]
                _block(left, (row + r) * size, size, _panel_of_rows(block_rows, size), block_rows)
        _give_back(rounded, here, tokens, y, first * width + column + row, width)


@compiled(inline="always")
def _piece(size, most):
    """How many rows of a core with such blocks on its left a thread takes at a time."""
    return max(size, most // size * size) if size else most


@compiled(parallel=True, nogil=True)
def _right_products(like, x, d_in, parts):
    """B x of every part, (parts, d_in, TILE), flat; x itself where there is no B."""
    inputs = np.empty(parts.shape[0] * d_in * TILE, dtype=np.uint16)
    ends = np.empty(parts.shape[0], dtype=np.int64)  # of each part's blocks
    blocks = 0
    for p in range(parts.shape[0]):
        blocks += -(-d_in // (parts[p, 6] or COLUMNS))
        ends[p] = blocks
    for i in prange(blocks):
        p = np.searchsorted(ends, i, side="right")
        size, first, tokens = parts[p, 6] or COLUMNS, parts[p, 7], parts[p, 8]
        channel = (i - (ends[p] + -d_in // size)) * size
        here, at = min(size, d_in - channel), (p * d_in + channel) * TILE
        given = inputs[at : at + here * TILE]
        panel = _panel_of_tokens(x, first * d_in + channel, d_in, tokens, here)
        if parts[p, 6]:
            _block(carray(pointer(parts[p, 3], like), d_in * size), channel * size, size, panel, given)
        else:
            for c in range(here):
                for t in range(TILE):
                    given[c * TILE + t] = panel[(c >> 1) * 2 * TILE + 2 * t + (c & 1)]
    return inputs


@compiled()
def _panel_of_tokens(x, at, step, tokens, columns):
    """(columns / 2, TILE, 2) = x[at + t step : … + columns] for every token t; zeros for a column or token too many."""
    panel = _aligned((columns + columns % 2) * TILE)
    if tokens < TILE or columns % 2:
        panel[:] = 0
    squares, even = tokens // 16 * 16, columns // 32 * 32
    for t in range(0, squares, 16):
        for c in range(0, even, 32):
            transpose_pairs(x, at + t * step + c, step, panel, c * TILE + 2 * t, 2 * TILE)
    for t in range(tokens):
        for c in range(even if t < squares else 0, columns):
            panel[(c >> 1) * 2 * TILE + 2 * t + (c & 1)] = x[at + t * step + c]
    return panel


@compiled()
def _give_back(z, rows, tokens, y, at, step):
    """y[at + t step : … + rows] = z (rows, TILE) of every token t."""
    squares, even = tokens // 16 * 16, rows // 32 * 32
    panel = _panel_of_rows(z, even)
    for r in range(0, even, 32):
        for t in range(0, squares, 16):
            transpose_pairs(panel, r * TILE + 2 * t, 2 * TILE, y, at + t * step + r, step)
    for t in range(tokens):
        for r in range(even if t < squares else 0, rows):
            y[at + t * step + r] = z[r * TILE + t]


@compiled()
def _panel_of_rows(z, rows):
    """(rows / 2, TILE, 2) = the pairs of rows of z (rows, TILE), and zeros beside an odd one at the end."""
    panel = _aligned((rows + rows % 2) * TILE)
    for r in range(0, rows - 1, 2):
        for t in range(0, TILE, 16):
            store_pairs(panel, r * TILE + 2 * t, take_turns(z, r * TILE + t, (r + 1) * TILE + t))
    if rows % 2:
        for t in range(TILE):
            panel[(rows - 1) * TILE + 2 * t], panel[(rows - 1) * TILE + 2 * t + 1] = z[(rows - 1) * TILE + t], 0
    return panel


@compiled()
def _aligned(count):
    """A bfloat16 buffer that starts a cache line, so that no vector straddles two."""
    buffer = np.empty(count + 32, dtype=np.uint16)
    offset = -(buffer.ctypes.data // 2) % 32
    return buffer[offset : offset + count]


@compiled()
def _round(sums, rounded):
    """rounded = sums, in bfloat16."""
    for k in range(0, sums.shape[0], 16):
        store_rounded(rounded, k, load(sums, k))


@compiled()
def _core(values, positions, row, rows, d_in, inputs, z):
    """Add rows row..row + rows - 1 of a packed core times the inputs (d_in, TILE) to z (rows, TILE)."""
    kept, row_bytes = d_in // 2, (d_in + 7) // 8
    panel = _aligned(COLUMNS // 4 * len(PAIRS) * 2 * TILE)
    for column in range(0, d_in, COLUMNS):
        groups = min(COLUMNS, d_in - column) // 4
        _lay_out(inputs, column * TILE, groups, panel)
        at, byte = row * kept + column // 2, row * row_bytes + column // 8
        for r in range(0, rows, 2):
            a, b = r, min(r + 1, rows - 1)  # an odd row at the end is done twice, with the same result
            for ahead in range(4, 6):
                prefetch(values, at + (r + ahead) * kept)
                prefetch(positions, byte + (r + ahead) * row_bytes)
            at_a, at_b, byte_a, byte_b = at + a * kept, at + b * kept, byte + a * row_bytes, byte + b * row_bytes
            _two_rows(values, at_a, at_b, positions, byte_a, byte_b, groups, panel, z, a * TILE, b * TILE)


@compiled()
def _lay_out(inputs, at, groups, panel):
    """panel (groups, 6, TILE, 2) = the pairs of every four rows of the inputs (…, TILE) from inputs[at] on."""
    for g in range(groups):
        to = g * len(PAIRS) * 2 * TILE
        for t in range(at + 4 * g * TILE, at + (4 * g + 1) * TILE, 16):
            for pair in range(len(PAIRS)):
                low, high = PAIRS[pair]
                store_pairs(panel, to + pair * 2 * TILE, take_turns(inputs, t + low * TILE, t + high * TILE))
            to += 32


@compiled(inline="always")
def _pair(positions, byte, group, panel_at):
    """Where in a panel the pair of columns stands that a row keeps of a group."""
    code = np.uint64(positions[byte + (group >> 1)] >> np.uint8(4 * (group & 1))) & np.uint64(15)
    return (panel_at + np.int64((PAIR_OF_CODE >> (code << np.uint64(2))) & np.uint64(7))) * 2 * TILE


@compiled()
def _two_rows(values, at_a, at_b, positions, byte_a, byte_b, groups, panel, z, z_a, z_b):
    """Add two rows of a core, those that start at ``at_a`` and ``at_b``, times a panel to z[z_a…] and z[z_b…]."""
    a0, a1, a2, a3 = load(z, z_a), load(z, z_a + 16), load(z, z_a + 32), load(z, z_a + 48)
    b0, b1, b2, b3 = load(z, z_b), load(z, z_b + 16), load(z, z_b + 32), load(z, z_b + 48)
    for g in range(groups):
        weights, p = spread_pair(values, at_a + 2 * g), _pair(positions, byte_a, g, g * len(PAIRS))
        a0 = add_products(a0, weights, load_pairs(panel, p))
        a1 = add_products(a1, weights, load_pairs(panel, p + 32))
        a2 = add_products(a2, weights, load_pairs(panel, p + 64))
        a3 = add_products(a3, weights, load_pairs(panel, p + 96))
        weights, p = spread_pair(values, at_b + 2 * g), _pair(positions, byte_b, g, g * len(PAIRS))
        b0 = add_products(b0, weights, load_pairs(panel, p))
        b1 = add_products(b1, weights, load_pairs(panel, p + 32))
        b2 = add_products(b2, weights, load_pairs(panel, p + 64))
        b3 = add_products(b3, weights, load_pairs(panel, p + 96))
    store(z, z_a, a0), store(z, z_a + 16, a1), store(z, z_a + 32, a2), store(z, z_a + 48, a3)
    store(z, z_b, b0), store(z, z_b + 16, b1), store(z, z_b + 32, b2), store(z, z_b + 48, b3)


@compiled()
def _block(blocks, at, size, panel, y):
    """y (size, TILE) = the block at blocks[at], (size, size), times a panel (size / 2, TILE, 2)."""
    step = size + size % 2
    block = blocks[at : at + size * size]
    if size % 2:
        block = np.zeros(size * step, dtype=np.uint16)
        for r in range(size):
            block[r * step : r * step + size] = blocks[at + r * size : at + (r + 1) * size]
    for a in range(0, size, 2):
        b = min(a + 1, size - 1)
        _two_block_rows(block, a * step, b * step, step, panel, y, a * TILE, b * TILE)


@compiled()
def _two_block_rows(block, at_a, at_b, step, panel, y, y_a, y_b):
    """y[y_a…] and y[y_b…] = two rows of a block, of even length ``step``, times a panel (step / 2, TILE, 2)."""
    a0, a1, a2, a3 = zeros(), zeros(), zeros(), zeros()
    b0, b1, b2, b3 = zeros(), zeros(), zeros(), zeros()
    for c in range(0, step, 2):
        weights_a, weights_b, p = spread_pair(block, at_a + c), spread_pair(block, at_b + c), c * TILE
        x0, x1, x2, x3 = (
            load_pairs(panel, p),
            load_pairs(panel, p + 32),
            load_pairs(panel, p + 64),
            load_pairs(panel, p + 96),
        )
        a0, a1 = add_products(a0, weights_a, x0), add_products(a1, weights_a, x1)
        a2, a3 = add_products(a2, weights_a, x2), add_products(a3, weights_a, x3)
        b0, b1 = add_products(b0, weights_b, x0), add_products(b1, weights_b, x1)
        b2, b3 = add_products(b2, weights_b, x2), add_products(b3, weights_b, x3)
    _put(y, y_a, a0, a1, a2, a3)
    _put(y, y_b, b0, b1, b2, b3)


@compiled()
def _put(y, at, first, second, third, fourth):
    """y[at : at + TILE] = four vectors, rounded."""
    store_rounded(y, at, first), store_rounded(y, at + 16, second)
    store_rounded(y, at + 32, third), store_rounded(y, at + 48, fourth)
