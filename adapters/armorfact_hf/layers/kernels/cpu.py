"""Compiled CPU products with a packed 2:4 core, read straight from memory; numba, parallel over rows.

A row of the core holds d_in / 2 kept values and, in two bits each, their positions in their groups of four. One token
is bound by memory, so values and positions are read once, at the size they are stored in, one byte for int8, and the
wrappers' blocks are applied in the same passes. Many tokens are bound by arithmetic: half the multiplications of a
dense product, on panels of tokens that stay in the nearest cache.
"""

from __future__ import annotations

import numpy as np
from numba import carray, prange

from armorfact.arrays.compiled import compiled
from armorfact_hf.layers.kernels.simd import (
    element,
    expand,
    fma,
    load,
    pick,
    pointer,
    prefetch,
    put,
    read_places,
    spread,
    store,
    total,
    zeros,
)

BYTES = np.empty(0, dtype=np.uint8)  # what `pointer` makes entries of
# The columns that a byte of positions keeps, of eight; bytes that no core holds are in it too.
_CODES = np.arange(256)
KEPT_COLUMNS = sum(np.uint32(1) << (4 * (k // 2) + (_CODES >> 2 * k & 3)).astype(np.uint32) for k in range(4)).astype(
    np.uint32
)
# Rows of the core that one thread takes at a time where no wrapper sets the number.
ROWS = 64
# Columns up to which one row at a time is faster: a token of them stays in the nearest cache beside what streams by.
SHORT = 2048
# Kept values ahead of the ones in use that such a stream asks for.
STREAM = 2048
# A panel of 64 columns and 128 tokens (32 KiB) fits the nearest cache; 128 tokens are eight registers of sums.
COLUMNS, TOKENS = 64, 128
# Rows ahead whose values are asked for: they lie a whole row apart, where no hardware prefetcher finds them.
AHEAD = 8


@compiled(inline="always")
def _column(positions, row_byte, k):
    """The column of a row's k-th kept value."""
    return 4 * (k >> 1) + ((positions[row_byte + (k >> 2)] >> (2 * (k & 3))) & 3)


@compiled()
def _dot(blocks, at, x, x_at, count):
    """blocks[at : at + count] · x[x_at : x_at + count]."""
    sums = zeros()
    vectors = count // 16 * 16
    for k in range(0, vectors, 16):
        sums = fma(load(blocks, at + k), load(x, x_at + k), sums)
    result = total(sums)
    for k in range(vectors, count):
        result += element(blocks, at + k) * x[x_at + k]
    return result


@compiled()
def _four_rows(values, positions, row, kept, row_bytes, x, x_at, z, z_at):
    """z[z_at + 0..3] = rows row..row + 3 of the core times one token."""
    a, b, c, d = zeros(), zeros(), zeros(), zeros()
    vectors = kept // 16 * 16
    first, first_byte = row * kept, row * row_bytes
    for k in range(0, vectors, 16):
        at, byte = first + k, first_byte + (k >> 2)
        for ahead in range(4, 8):
            prefetch(values, at + ahead * kept)
        if k & 255 == 0:
            for ahead in range(4, 8):
                prefetch(positions, byte + ahead * row_bytes)
        a = fma(load(values, at), pick(x, x_at + 2 * k, read_places(positions, byte)), a)
        at, byte = at + kept, byte + row_bytes
        b = fma(load(values, at), pick(x, x_at + 2 * k, read_places(positions, byte)), b)
        at, byte = at + kept, byte + row_bytes
        c = fma(load(values, at), pick(x, x_at + 2 * k, read_places(positions, byte)), c)
        at, byte = at + kept, byte + row_bytes
        d = fma(load(values, at), pick(x, x_at + 2 * k, read_places(positions, byte)), d)
    z[z_at], z[z_at + 1], z[z_at + 2], z[z_at + 3] = total(a), total(b), total(c), total(d)
    for r in range(4):
        for k in range(vectors, kept):
            column = _column(positions, first_byte + r * row_bytes, k)
            z[z_at + r] += element(values, first + r * kept + k) * x[x_at + column]


@compiled()
def _four_tokens(values, positions, row, kept, row_bytes, x, x_at, d_in, z, z_at, z_step):
    """z[z_at + t z_step] = one row of the core times tokens t = 0..3, whose values are read once."""
    a, b, c, d = zeros(), zeros(), zeros(), zeros()
    vectors = kept // 16 * 16
    first, first_byte = row * kept, row * row_bytes
    for k in range(0, vectors, 16):
        prefetch(values, first + k + kept)
        where = read_places(positions, first_byte + (k >> 2))
        weights = load(values, first + k)
        at = x_at + 2 * k
        a = fma(weights, pick(x, at, where), a)
        b = fma(weights, pick(x, at + d_in, where), b)
        c = fma(weights, pick(x, at + 2 * d_in, where), c)
        d = fma(weights, pick(x, at + 3 * d_in, where), d)
    z[z_at], z[z_at + z_step], z[z_at + 2 * z_step], z[z_at + 3 * z_step] = total(a), total(b), total(c), total(d)
    for k in range(vectors, kept):
        weight = element(values, first + k)
        column = _column(positions, first_byte, k)
        for t in range(4):
            z[z_at + t * z_step] += weight * x[x_at + t * d_in + column]


@compiled()
def _one_row(values, positions, row, kept, row_bytes, x, x_at):
    """One row of the core times one token; row after row, memory is read in a single stream."""
    a, b, c, d = zeros(), zeros(), zeros(), zeros()
    vectors, quads = kept // 16 * 16, kept // 64 * 64
    first, first_byte = row * kept, row * row_bytes
    for k in range(0, quads, 64):
        at, byte, x_from = first + k, first_byte + (k >> 2), x_at + 2 * k
        prefetch(values, at + STREAM)
        prefetch(values, at + STREAM + 32)
        prefetch(positions, byte + (STREAM >> 2))
        a = fma(load(values, at), pick(x, x_from, read_places(positions, byte)), a)
        b = fma(load(values, at + 16), pick(x, x_from + 32, read_places(positions, byte + 4)), b)
        c = fma(load(values, at + 32), pick(x, x_from + 64, read_places(positions, byte + 8)), c)
        d = fma(load(values, at + 48), pick(x, x_from + 96, read_places(positions, byte + 12)), d)
    for k in range(quads, vectors, 16):
        where = read_places(positions, first_byte + (k >> 2))
        a = fma(load(values, first + k), pick(x, x_at + 2 * k, where), a)
    result = (total(a) + total(b)) + (total(c) + total(d))
    for k in range(vectors, kept):
        result += element(values, first + k) * x[x_at + _column(positions, first_byte, k)]
    return result


@compiled()
def _core_rows(values, positions, row, rows, x, tokens, d_in, z):
    """z (tokens, rows), flat = rows row..row + rows - 1 of the core times every token."""
    kept, row_bytes = d_in // 2, (d_in + 7) // 8
    fours = tokens // 4 * 4
    for t in range(0, fours, 4):
        for r in range(rows):
            _four_tokens(values, positions, row + r, kept, row_bytes, x, t * d_in, d_in, z, t * rows + r, rows)
    for t in range(fours, tokens):
        quads = rows // 4 * 4 if d_in > SHORT else 0
        for r in range(0, quads, 4):
            _four_rows(values, positions, row + r, kept, row_bytes, x, t * d_in, z, t * rows + r)
        for r in range(quads, rows):
            z[t * rows + r] = _one_row(values, positions, row + r, kept, row_bytes, x, t * d_in)


@compiled(parallel=True, nogil=True)
def few_tokens(like, values_like, blocks_like, x, y, tokens, d_in, parts):
    """y = A C B x of one or several layers side by side, for a handful of tokens, in two parallel passes: B, then C, A.

    Arguments are addresses and sizes, since a small layer is done in the time that it takes to unwrap six arrays.

    Args:
        like: an array of the layers' dtype: float32, int16 for float16, uint16 for bfloat16.
        values_like, blocks_like: arrays of that of the kept values and of that of the wrappers' blocks: the same, or
            int8.
        x: of (tokens, d_in). y: of (tokens, d_out of all), written.
        parts: (layers, 9) int64, for each layer the addresses of its factors, 0 for none, and its sizes:
            values (d_out, d_in / 2), positions (d_out, ceil(d_in / 8)) uint8, two bits a kept value, left and right
            (blocks, size, size), d_out, and the sizes of the blocks on the left and on the right, 0 for none; then the
            addresses of the scales of left (2, d_out) and of right (2, d_in), those of rows first, 0 for none.
    """
    layers, width = parts.shape[0], np.sum(parts[:, 4])
    y = carray(pointer(y, like), tokens * width)
    wide = _widened(carray(pointer(x, like), tokens * d_in))
    inputs = _right_products(like, blocks_like, wide, tokens, d_in, parts)
    ends = np.empty(layers, dtype=np.int64)  # of each layer's pieces of rows
    first_rows = np.empty(layers, dtype=np.int64)
    pieces = rows_before = 0
    for p in range(layers):
        pieces += -(-parts[p, 4] // _piece(parts, p))
        ends[p], first_rows[p] = pieces, rows_before
        rows_before += parts[p, 4]
    for i in prange(pieces):
        p = np.searchsorted(ends, i, side="right")
        d_out, block_out, rows = parts[p, 4], parts[p, 5], _piece(parts, p)
        row = (i - (ends[p] + -d_out // rows)) * rows
        here = min(rows, d_out - row)
        values = carray(pointer(parts[p, 0], values_like), d_out * (d_in // 2))
        positions = carray(pointer(parts[p, 1], BYTES), d_out * ((d_in + 7) // 8))
        left = carray(pointer(parts[p, 2], blocks_like), d_out * block_out)
        z = np.empty(tokens * here, dtype=np.float32)
        given = inputs[p] if parts[p, 6] else wide
        _core_rows(values, positions, row, here, given, tokens, d_in, z)
        scales = carray(pointer(parts[p, 7], like), 2 * d_out)
        for t in range(tokens):
            at = t * here
            if parts[p, 7]:
                _scale(z, at, scales, d_out + row, here)
            for r in range(here):
                result = _dot(left, (row + r) * here, z, at, here) if block_out else z[at + r]
                if parts[p, 7]:
                    result *= element(scales, row + r)
                put(y, t * width + first_rows[p] + row + r, result)


@compiled()
def _scale(z, at, scales, first, count):
    """z[at : at + count] *= scales[first : first + count]."""
    for k in range(count):
        z[at + k] *= element(scales, first + k)


@compiled(inline="always")
def _piece(parts, p):
    """How many rows of a layer's core a thread takes at a time."""
    return parts[p, 5] if parts[p, 5] else ROWS


@compiled()
def _widened(x):
    """x in float32."""
    wide = np.empty(x.shape[0], dtype=np.float32)
    for k in range(x.shape[0]):
        wide[k] = element(x, k)
    return wide


@compiled(parallel=True, nogil=True)
def _right_products(like, blocks_like, x, tokens, d_in, parts):
    """B x of every layer that has a B, each flat like x, (layers, tokens * d_in)."""
    layers = parts.shape[0]
    products = np.empty((layers, tokens * d_in), dtype=np.float32)
    ends = np.empty(layers, dtype=np.int64)
    blocks = 0
    for p in range(layers):
        blocks += d_in // parts[p, 6] if parts[p, 6] else 0
        ends[p] = blocks
    for i in prange(blocks):
        p = np.searchsorted(ends, i, side="right")
        size = parts[p, 6]
        right = carray(pointer(parts[p, 3], blocks_like), d_in * size)
        first = (i - (ends[p] - d_in // size)) * size
        scales = carray(pointer(parts[p, 8], like), 2 * d_in)
        given = np.empty(size, dtype=np.float32)
        for t in range(tokens):
            at = t * d_in + first
            given[:] = x[at : at + size]
            if parts[p, 8]:
                _scale(given, 0, scales, d_in + first, size)
            for r in range(size):
                products[p, at + r] = _dot(right, (first + r) * size, given, 0, size)
            if parts[p, 8]:
                _scale(products[p], at, scales, first, size)
    return products


@compiled(inline="always")
def _aligned(count):
    """A float32 buffer that starts a cache line, so that no vector straddles two."""
    buffer = np.empty(count + 16, dtype=np.float32)
    offset = -(buffer.ctypes.data // 4) % 16
    return buffer[offset : offset + count]


@compiled()
def _panel_row(values, positions, at, byte, kept, panel, sums, s):
    """Add to one row's sums over a panel's tokens: kept values from ``at`` on times the panel's rows they stand for."""
    s0, s1, s2, s3 = load(sums, s), load(sums, s + 16), load(sums, s + 32), load(sums, s + 48)
    s4, s5, s6, s7 = load(sums, s + 64), load(sums, s + 80), load(sums, s + 96), load(sums, s + 112)
    for b in range(kept // 4):
        code = np.int64(positions[byte + b])
        for q in range(4):
            weight = spread(element(values, at + 4 * b + q))
            p = (8 * b + 4 * (q >> 1) + ((code >> (2 * q)) & 3)) * TOKENS
            s0 = fma(weight, load(panel, p), s0)
            s1 = fma(weight, load(panel, p + 16), s1)
            s2 = fma(weight, load(panel, p + 32), s2)
            s3 = fma(weight, load(panel, p + 48), s3)
            s4 = fma(weight, load(panel, p + 64), s4)
            s5 = fma(weight, load(panel, p + 80), s5)
            s6 = fma(weight, load(panel, p + 96), s6)
            s7 = fma(weight, load(panel, p + 112), s7)
    store(sums, s, s0), store(sums, s + 16, s1), store(sums, s + 32, s2), store(sums, s + 48, s3)
    store(sums, s + 64, s4), store(sums, s + 80, s5), store(sums, s + 96, s6), store(sums, s + 112, s7)
    for k in range(kept // 4 * 4, kept):  # a half byte at the end of a row
        weight, p = element(values, at + k), _column(positions, byte, k) * TOKENS
        for t in range(TOKENS):
            sums[s + t] += weight * panel[p + t]


@compiled(parallel=True, nogil=True)
def many_tokens(x, values, positions, y, rows):
    """y = C x for many tokens, which lie side by side.

    Args:
        x: (d_in, tokens) float32. y: (d_out, tokens) float32, written.
        values: (d_out, d_in / 2) float32, float16 as int16, bfloat16 as uint16, or int8.
        positions: (d_out * ceil(d_in / 8),) uint8, two bits a kept value.
        rows: of the core that one thread takes at a time.
    """
    d_in, tokens = x.shape
    d_out = y.shape[0]
    kept, row_bytes = d_in // 2, (d_in + 7) // 8
    for i in prange((d_out + rows - 1) // rows):
        row, end = i * rows, min((i + 1) * rows, d_out)
        sums, panel = _aligned((end - row) * TOKENS), _aligned(COLUMNS * TOKENS)
        for t in range(0, tokens, TOKENS):
            width = min(TOKENS, tokens - t)
            sums[:] = 0
            panel[:] = 0
            for column in range(0, d_in, COLUMNS):
                height = min(COLUMNS, d_in - column)
                for c in range(height):
                    panel[c * TOKENS : c * TOKENS + width] = x[column + c, t : t + width]
                for r in range(row, end):
                    at, byte = r * kept + column // 2, r * row_bytes + column // 8
                    prefetch(values, at + AHEAD * kept)
                    prefetch(positions, byte + AHEAD * row_bytes)
                    _panel_row(values, positions, at, byte, height // 2, panel, sums, (r - row) * TOKENS)
            for r in range(row, end):
                y[r, t : t + width] = sums[(r - row) * TOKENS : (r - row) * TOKENS + width]


@compiled(parallel=True, nogil=True)
def unpack(values, positions, dense):
    """Write the core with its zeros.

    Args:
        values: (d_out, d_in / 2), any type. positions: see `many_tokens`.
        dense: (d_out, d_in) like values, written.
    """
    rows, d_in = dense.shape
    kept, row_bytes, columns = d_in // 2, (d_in + 7) // 8, 64 // dense.itemsize
    vectors = d_in // columns * columns
    for r in prange(rows):
        row, byte = r * kept, r * row_bytes
        for column in range(0, vectors, columns):
            mask = np.uint32(0)
            for b in range(columns // 8):
                mask |= KEPT_COLUMNS[positions[byte + column // 8 + b]] << np.uint32(8 * b)
            expand(dense, r * d_in + column, values, row + column // 2, mask)
        dense[r, vectors:] = 0
        for k in range(vectors // 2, kept):
            dense[r, _column(positions, byte, k)] = values[r, k]
