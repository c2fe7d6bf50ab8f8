"""Two rows of a bfloat16 matrix times four tokens in bfloat16 at a time, in pairs: see `bf16`. Sums are float32.

Sizes are such that no vector is cut: `FEWEST` tokens or more, and the last four may overlap those before.
"""

from __future__ import annotations

import numpy as np

from armorfact.arrays.compiled import compiled
from armorfact_hf.layers.kernels.bf16 import (
    add_products,
    load_pairs,
    pick_pairs,
    read_many_places,
)
from armorfact_hf.layers.kernels.simd import prefetch, total, zeros

FEWEST = 4  # tokens


@compiled()
def core_in_pairs(values, positions, row, rows, x, tokens, d_in, z):
    """z (tokens, rows), flat = rows row..row + rows - 1 of a packed core times every token.

    64 divides d_in, and there are two rows or more.
    """
    kept, row_bytes = d_in // 2, d_in // 8
    for t in range(0, tokens, 4):
        token = min(t, tokens - 4)
        for r in range(0, rows, 2):
            first = min(r, rows - 2)
            at = token * rows + first
            _two_rows(values, positions, row + first, kept, row_bytes, x, token * d_in, d_in, z, at, rows)


@compiled()
def _two_rows(values, positions, row, kept, row_bytes, x, x_at, d_in, z, z_at, z_step):
    """z[z_at + t z_step + r] = rows row + r, r = 0, 1, of the core times tokens t = 0..3."""
    a0, a1, a2, a3 = zeros(), zeros(), zeros(), zeros()
    b0, b1, b2, b3 = zeros(), zeros(), zeros(), zeros()
    first, first_byte = row * kept, row * row_bytes
    second, second_byte = first + kept, first_byte + row_bytes
    for k in range(0, kept, 32):
        prefetch(values, second + k + kept)
        prefetch(values, second + k + 2 * kept)
        a, a_where = load_pairs(values, first + k), read_many_places(positions, first_byte + (k >> 2))
        b, b_where = load_pairs(values, second + k), read_many_places(positions, second_byte + (k >> 2))
        at = x_at + 2 * k
        a0 = add_products(a0, a, pick_pairs(x, at, a_where))
        b0 = add_products(b0, b, pick_pairs(x, at, b_where))
        a1 = add_products(a1, a, pick_pairs(x, at + d_in, a_where))
        b1 = add_products(b1, b, pick_pairs(x, at + d_in, b_where))
        a2 = add_products(a2, a, pick_pairs(x, at + 2 * d_in, a_where))
        b2 = add_products(b2, b, pick_pairs(x, at + 2 * d_in, b_where))
        a3 = add_products(a3, a, pick_pairs(x, at + 3 * d_in, a_where))
        b3 = add_products(b3, b, pick_pairs(x, at + 3 * d_in, b_where))
    z[z_at], z[z_at + z_step], z[z_at + 2 * z_step], z[z_at + 3 * z_step] = total(a0), total(a1), total(a2), total(a3)
    z_at += 1
    z[z_at], z[z_at + z_step], z[z_at + 2 * z_step], z[z_at + 3 * z_step] = total(b0), total(b1), total(b2), total(b3)


@compiled()
def block_in_pairs(block, at, size, x, x_at, x_step, tokens):
    """(tokens, size), flat: the block at block[at], (size, size), times x[x_at + t x_step : … + size] for every t.

    32 divides size.
    """
    z = np.empty(tokens * size, dtype=np.float32)
    for t in range(0, tokens, 4):
        token = min(t, tokens - 4)
        for r in range(0, size, 2):
            a0, a1, a2, a3 = zeros(), zeros(), zeros(), zeros()
            b0, b1, b2, b3 = zeros(), zeros(), zeros(), zeros()
            for k in range(0, size, 32):
                a = load_pairs(block, at + r * size + k)
                b = load_pairs(block, at + (r + 1) * size + k)
                from_at = x_at + token * x_step + k
                x0, x1 = load_pairs(x, from_at), load_pairs(x, from_at + x_step)
                x2, x3 = load_pairs(x, from_at + 2 * x_step), load_pairs(x, from_at + 3 * x_step)
                a0, a1, a2, a3 = (
                    add_products(a0, a, x0),
                    add_products(a1, a, x1),
                    add_products(a2, a, x2),
                    add_products(a3, a, x3),
                )
                b0, b1, b2, b3 = (
                    add_products(b0, b, x0),
                    add_products(b1, b, x1),
                    add_products(b2, b, x2),
                    add_products(b3, b, x3),
                )
            i = token * size + r
            z[i], z[i + size], z[i + 2 * size], z[i + 3 * size] = total(a0), total(a1), total(a2), total(a3)
            i += 1
            z[i], z[i + size], z[i + 2 * size], z[i + 3 * size] = total(b0), total(b1), total(b2), total(b3)
    return z
