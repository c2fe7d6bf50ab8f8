"""The compiled CPU product of several experts' packed 2:4 layers, each with its own few tokens, in one call.

Two rows of a core are multiplied with four tokens at a time, and a row of a block with four: what is loaded of either
serves all of the other. In bfloat16, on a processor that multiplies pairs of them, four tokens and more are in bfloat16
between the factors (`cpu_pairs`); fewer, and all other dtypes, are in float32.
"""

from __future__ import annotations

import numpy as np
from numba import carray, prange, types
from numba.extending import overload

from armorfact.arrays.compiled import compiled
from armorfact_hf.layers.kernels.bf16 import has_bf16
from armorfact_hf.layers.kernels.cpu import BYTES, _column, _core_rows, _dot, _piece, _widened
from armorfact_hf.layers.kernels.cpu_pairs import FEWEST, block_in_pairs, core_in_pairs
from armorfact_hf.layers.kernels.simd import (
    element,
    fma,
    load,
    pick,
    pointer,
    prefetch,
    put,
    read_places,
    total,
    zeros,
)


@compiled(parallel=True, nogil=True)
def expert_rows(like, values_like, x, y, rows, d_in, width, parts):
    """y = A C B x of every part, on its rows of x and into its columns of y, in two parallel passes: B, then C and A.

    Threads share the rows of all cores, so that experts with one token each keep all of them busy.

    Args:
        like: an array of the layers' dtype: float32, int16 for float16, uint16 for bfloat16.
        values_like: one of that of the kept values, the same or int8.
        x: address of (rows, d_in). y: of (rows, width), written.
        parts: (parts, 10) int64, for each layer the addresses of its values, positions, left and right, d_out, and the
            sizes of the blocks on the left and on the right, as `cpu.few_tokens` takes them; then the first of its rows
            of x and y, how many rows those are, and the first of its columns of y.
    """
    y = carray(pointer(y, like), rows * width)
    stored = carray(pointer(x, like), rows * d_in)
    wide = _widened(stored)
    pairs = _pairs(stored, wide)
    starts = np.empty(parts.shape[0], dtype=np.int64)  # of each part's B x
    wide_inputs, pair_inputs = _right_products(like, wide, pairs, d_in, parts, starts)
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
        values = carray(pointer(parts[p, 0], values_like), d_out * (d_in // 2))
        positions = carray(pointer(parts[p, 1], BYTES), d_out * ((d_in + 7) // 8))
        left = carray(pointer(parts[p, 2], like), d_out * block_out)
        z = np.empty(tokens * here, dtype=np.float32)
        at = starts[p] if parts[p, 6] else first * d_in
        end = at + tokens * d_in
        given = wide_inputs[at:end] if parts[p, 6] else wide[at:end]
        given_pairs = pair_inputs[at:end] if parts[p, 6] else pairs[at:end]
        _rows_of_core(values, positions, row, here, given, given_pairs, tokens, d_in, z)
        if block_out:
            z = _block(left, row * here, here, z, _rounded(z, pairs, tokens), 0, here, tokens)
        for t in range(tokens):
            for r in range(here):
                put(y, (first + t) * width + column + row + r, z[t * here + r])


@compiled(parallel=True, nogil=True)
def _right_products(like, wide, pairs, d_in, parts, starts):
    """B x of every part that has a B, on its rows, flat one after another; where each starts goes into ``starts``.

    Returns:
        them in float32, and in the dtype of ``pairs``.
    """
    count = 0
    blocks = 0
    ends = np.empty(parts.shape[0], dtype=np.int64)
    for p in range(parts.shape[0]):
        starts[p] = count
        if parts[p, 6]:
            count += parts[p, 8] * d_in
            blocks += d_in // parts[p, 6]
        ends[p] = blocks
    products, rounded = np.empty(count, dtype=np.float32), np.empty(count, dtype=pairs.dtype)
    for i in prange(blocks):
        p = np.searchsorted(ends, i, side="right")
        size, first, tokens = parts[p, 6], parts[p, 7], parts[p, 8]
        right = carray(pointer(parts[p, 3], like), d_in * size)
        channel = (i - (ends[p] - d_in // size)) * size
        product = _block(right, channel * size, size, wide, pairs, first * d_in + channel, d_in, tokens)
        for t in range(tokens):
            for r in range(size):
                at = starts[p] + t * d_in + channel + r
                products[at] = product[t * size + r]
                if tokens >= FEWEST:
                    put(rounded, at, product[t * size + r])
    return products, rounded


def _pairs(stored, wide):
    """What is multiplied in pairs: x as it is stored, if it can be; else the float32 that it is anyhow."""


def _rounded(z, pairs, tokens):
    """The float32 z in the dtype of ``pairs``; nothing where there are too few tokens for that to be used."""


def _rows_of_core(values, positions, row, rows, wide, pairs, tokens, d_in, z):
    """z (tokens, rows), flat = rows row..row + rows - 1 of the core times every token, which come in two dtypes."""


def _block(block, at, size, wide, pairs, x_at, x_step, tokens):
    """(tokens, size), flat: the block at block[at], (size, size), times x[x_at + t x_step : … + size] for every t."""


@overload(_pairs)
def _pairs_of(stored, wide):
    if stored.dtype == types.uint16 and has_bf16():
        return lambda stored, wide: stored
    return lambda stored, wide: wide


@overload(_rounded)
def _rounded_to(z, pairs, tokens):
    def rounded(z, pairs, tokens):
        found = np.empty(z.shape[0] if tokens >= FEWEST else 0, dtype=pairs.dtype)
        for k in range(found.shape[0]):
            put(found, k, z[k])
        return found

    return rounded if pairs.dtype == types.uint16 else lambda z, pairs, tokens: z


@overload(_rows_of_core)
def _rows_of_core_by(values, positions, row, rows, wide, pairs, tokens, d_in, z):
    def widely(values, positions, row, rows, wide, pairs, tokens, d_in, z):
        _wide_rows(values, positions, row, rows, wide, tokens, d_in, z)

    def in_pairs(values, positions, row, rows, wide, pairs, tokens, d_in, z):
        if tokens >= FEWEST and rows > 1 and d_in % 64 == 0:
            core_in_pairs(values, positions, row, rows, pairs, tokens, d_in, z)
        else:
            _wide_rows(values, positions, row, rows, wide, tokens, d_in, z)

    return in_pairs if pairs.dtype == values.dtype == types.uint16 else widely


@overload(_block)
def _block_by(block, at, size, wide, pairs, x_at, x_step, tokens):
    def widely(block, at, size, wide, pairs, x_at, x_step, tokens):
        return _wide_block(block, at, size, wide, x_at, x_step, tokens)

    def in_pairs(block, at, size, wide, pairs, x_at, x_step, tokens):
        if tokens >= FEWEST and size % 32 == 0:
            return block_in_pairs(block, at, size, pairs, x_at, x_step, tokens)
        return _wide_block(block, at, size, wide, x_at, x_step, tokens)

    return in_pairs if pairs.dtype == types.uint16 else widely


@compiled()
def _wide_rows(values, positions, row, rows, x, tokens, d_in, z):
    """`_rows_of_core` in float32."""
    kept, row_bytes = d_in // 2, (d_in + 7) // 8
    fours, pairs = tokens // 4 * 4, rows // 2 * 2
    for t in range(0, fours, 4):
        for r in range(0, pairs, 2):
            _two_rows(values, positions, row + r, kept, row_bytes, x, t * d_in, d_in, z, t * rows + r, rows)
    for r in range(pairs, rows if fours else pairs):
        last = np.empty(fours, dtype=np.float32)
        _core_rows(values, positions, row + r, 1, x, fours, d_in, last)
        for t in range(fours):
            z[t * rows + r] = last[t]
    if fours < tokens:
        _core_rows(values, positions, row, rows, x[fours * d_in :], tokens - fours, d_in, z[fours * rows :])


@compiled()
def _two_rows(values, positions, row, kept, row_bytes, x, x_at, d_in, z, z_at, z_step):
    """z[z_at + t z_step + r] = rows row + r, r = 0, 1, of the core times tokens t = 0..3."""
    a0, a1, a2, a3 = zeros(), zeros(), zeros(), zeros()
    b0, b1, b2, b3 = zeros(), zeros(), zeros(), zeros()
    vectors = kept // 16 * 16
    first, first_byte = row * kept, row * row_bytes
    second, second_byte = first + kept, first_byte + row_bytes
    for k in range(0, vectors, 16):
        prefetch(values, second + k + kept)
        prefetch(values, second + k + 2 * kept)
        a, a_where = load(values, first + k), read_places(positions, first_byte + (k >> 2))
        b, b_where = load(values, second + k), read_places(positions, second_byte + (k >> 2))
        at = x_at + 2 * k
        a0 = fma(a, pick(x, at, a_where), a0)
        b0 = fma(b, pick(x, at, b_where), b0)
        a1 = fma(a, pick(x, at + d_in, a_where), a1)
        b1 = fma(b, pick(x, at + d_in, b_where), b1)
        a2 = fma(a, pick(x, at + 2 * d_in, a_where), a2)
        b2 = fma(b, pick(x, at + 2 * d_in, b_where), b2)
        a3 = fma(a, pick(x, at + 3 * d_in, a_where), a3)
        b3 = fma(b, pick(x, at + 3 * d_in, b_where), b3)
    z[z_at], z[z_at + z_step], z[z_at + 2 * z_step], z[z_at + 3 * z_step] = total(a0), total(a1), total(a2), total(a3)
    z_at += 1
    z[z_at], z[z_at + z_step], z[z_at + 2 * z_step], z[z_at + 3 * z_step] = total(b0), total(b1), total(b2), total(b3)
    for k in range(vectors, kept):
        a_at, b_at = x_at + _column(positions, first_byte, k), x_at + _column(positions, second_byte, k)
        for t in range(4):
            z[z_at - 1 + t * z_step] += element(values, first + k) * x[a_at + t * d_in]
            z[z_at + t * z_step] += element(values, second + k) * x[b_at + t * d_in]


@compiled()
def _wide_block(block, at, size, x, x_at, x_step, tokens):
    """`_block` in float32."""
    result = np.empty(tokens * size, dtype=np.float32)
    fours, vectors = tokens // 4 * 4, size // 16 * 16
    for r in range(size):
        for t in range(0, fours, 4):
            a, b, c, d = zeros(), zeros(), zeros(), zeros()
            row, from_at = at + r * size, x_at + t * x_step
            for k in range(0, vectors, 16):
                weights = load(block, row + k)
                a = fma(weights, load(x, from_at + k), a)
                b = fma(weights, load(x, from_at + x_step + k), b)
                c = fma(weights, load(x, from_at + 2 * x_step + k), c)
                d = fma(weights, load(x, from_at + 3 * x_step + k), d)
            sums = (total(a), total(b), total(c), total(d))
            for i in range(4):
                entry = sums[i]
                for k in range(vectors, size):
                    entry += element(block, row + k) * x[from_at + i * x_step + k]
                result[(t + i) * size + r] = entry
        for t in range(fours, tokens):
            result[t * size + r] = _dot(block, at + r * size, x, x_at + t * x_step, size)
    return result
