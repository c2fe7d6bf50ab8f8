"""The compiled CPU product of several experts' packed 2:4 layers, each with its own few tokens, in one call."""

from __future__ import annotations

import numpy as np
from numba import carray, njit, prange

from armorfact_hf.layers.kernels.cpu import BYTES, _core_rows, _dot, _piece, _widened
from armorfact_hf.layers.kernels.simd import pointer, put


@njit(cache=True, parallel=True, nogil=True)
def expert_rows(like, x, y, rows, d_in, width, parts):
    """y = A C B x of every part, on its rows of x and into its columns of y, in two parallel passes: B, then C and A.

    Threads share the rows of all cores, so that experts with one token each keep all of them busy.

    Args:
        like: an array of the layers' dtype: float32, int16 for float16, uint16 for bfloat16.
        x: address of (rows, d_in). y: of (rows, width), written.
        parts: (parts, 10) int64, for each layer the addresses of its values, positions, left and right, d_out, and the
            sizes of the blocks on the left and on the right, as `cpu.few_tokens` takes them; then the first of its rows
            of x and y, how many rows those are, and the first of its columns of y.
    """
    y = carray(pointer(y, like), rows * width)
    wide = _widened(carray(pointer(x, like), rows * d_in))
    starts = np.empty(parts.shape[0], dtype=np.int64)  # of each part's B x
    inputs = _right_products(like, wide, d_in, parts, starts)
    ends = np.empty(parts.shape[0], dtype=np.int64)  # of each part's pieces of rows
    pieces = 0
    for p in range(parts.shape[0]):
        pieces += -(-parts[p, 4] // _piece(parts, p))
        ends[p] = pieces
    for i in prange(pieces):
        p = np.searchsorted(ends, i, side="right")
        d_out, block_out, piece = parts[p, 4], parts[p, 5], _piece(parts, p)
        first, tokens, column = parts[p, 7], parts[p, 8], parts[p, 9]
        row = (i - (ends[p] + -d_out // piece)) * piece
        here = min(piece, d_out - row)
        values = carray(pointer(parts[p, 0], like), d_out * (d_in // 2))
        positions = carray(pointer(parts[p, 1], BYTES), d_out * ((d_in + 7) // 8))
        left = carray(pointer(parts[p, 2], like), d_out * block_out)
        z = np.empty(tokens * here, dtype=np.float32)
        at = starts[p] if parts[p, 6] else first * d_in
        given = inputs[at : at + tokens * d_in] if parts[p, 6] else wide[at : at + tokens * d_in]
        _core_rows(values, positions, row, here, given, tokens, d_in, z)
        for t in range(tokens):
            for r in range(here):
                k = t * here
                result = _dot(left, (row + r) * here, z, k, here) if block_out else z[k + r]
                put(y, (first + t) * width + column + row + r, result)


@njit(cache=True, parallel=True, nogil=True)
def _right_products(like, x, d_in, parts, starts):
    """B x of every part that has a B, on its rows, flat one after another; where each starts goes into ``starts``."""
    count = 0
    blocks = 0
    ends = np.empty(parts.shape[0], dtype=np.int64)
    for p in range(parts.shape[0]):
        starts[p] = count
        if parts[p, 6]:
            count += parts[p, 8] * d_in
            blocks += d_in // parts[p, 6]
        ends[p] = blocks
    products = np.empty(count, dtype=np.float32)
    for i in prange(blocks):
        p = np.searchsorted(ends, i, side="right")
        size, first, tokens = parts[p, 6], parts[p, 7], parts[p, 8]
        right = carray(pointer(parts[p, 3], like), d_in * size)
        channel = (i - (ends[p] - d_in // size)) * size
        for t in range(tokens):
            for r in range(size):
                result = _dot(right, (channel + r) * size, x, (first + t) * d_in + channel, size)
                products[starts[p] + t * d_in + channel + r] = result
    return products
