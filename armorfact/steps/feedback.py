r"""Round the blocks of a wrapper to int8, each column making up for the errors of those before it.

A block A_i has a scale a row and a scale a column, and the exact step for it leaves a loss of
:math:`\operatorname{tr}(E D E^\top)` for an error E, with :math:`D = Z H Z^\top`. So each of its rows is an integer
least-squares problem of its own,

.. math:: \min_{q \in \mathbb{Z}^b}\; (a - q \operatorname{diag}(s))\,D\,(a - q \operatorname{diag}(s))^\top,

taken column after column: an entry is rounded, and the entries that are still free move to where they are best, given
its error (GPTQ, arXiv 2210.17323). A row for which that ends above rounding to nearest is rounded to nearest. For B the
same holds of its columns, with :math:`G_j^\top G_j` in the place of D.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from armorfact import arrays
from armorfact.result import BlockDiagonal
from armorfact.steps.damping import damped
from armorfact.steps.rounding import LARGEST, equilibrated, largest

Array = Any

MENDING = 1e-4  # far above what rounding does to a Gram matrix of unit diagonal in float32


def round_rows(blocks: Array, gram: Array, dtype: Any) -> BlockDiagonal:
    """The blocks in int8, each row rounded to lose little in its Gram matrix.

    Args:
        blocks: (count, size, size), floating. gram: (count, size, size), positive semidefinite.
        dtype: in which the scales are stored.
    """
    xp = arrays.namespace(blocks)
    gram = damped(gram)
    gram = (gram + arrays.transpose(gram)) / 2  # a product of two different factors; its inverse would blow this up
    costs = xp.linalg.diagonal(gram) ** 0.5
    gram = gram / (costs[..., :, None] * costs[..., None, :])
    blocks = arrays.float64(blocks) * costs[..., None, :]  # where the errors of all columns cost the same
    rows, columns = equilibrated(xp.abs(blocks))
    rows, columns = _stored(rows / LARGEST, columns / costs, dtype)
    step = arrays.float64(rows)[..., :, None] * (arrays.float64(columns) * costs)[..., None, :]
    near = _rounded(blocks / step)
    fed = _with_feedback(blocks, gram, step)
    if fed is None:
        return BlockDiagonal(xp.astype(near, xp.int8), rows, columns)
    better = _errors(blocks - fed * step, gram) < _errors(blocks - near * step, gram)
    integers = xp.where(better[..., None], fed, near)
    return BlockDiagonal(xp.astype(integers, xp.int8), rows, columns)


def round_columns(blocks: Array, gram: Array, dtype: Any) -> BlockDiagonal:
    """`round_rows` for the columns of blocks."""
    xp = arrays.namespace(blocks)
    found = round_rows(arrays.transpose(blocks), gram, dtype)
    integers = xp.asarray(arrays.transpose(found.blocks), copy=True)
    return BlockDiagonal(integers, found.columns, found.rows)


def round_plainly(blocks: Array, dtype: Any) -> BlockDiagonal:
    """The blocks in int8 with one scale a row, rounded to nearest."""
    xp = arrays.namespace(blocks)
    blocks = arrays.float64(blocks)
    rows = largest(xp.abs(blocks), -1) / LARGEST
    rows, columns = _stored(rows, xp.ones_like(rows), dtype)
    step = arrays.float64(rows)[..., :, None] * arrays.float64(columns)[..., None, :]
    return BlockDiagonal(xp.astype(_rounded(blocks / step), xp.int8), rows, columns)


def _stored(rows: Array, columns: Array, dtype: Any) -> tuple[Array, Array]:
    """The scales in the dtype that they are stored in, of about one size; ones where that has nothing so small."""
    xp = arrays.namespace(rows)
    across = (arrays.exponent(rows) - arrays.exponent(columns)) // 2
    rows, columns = (
        arrays.rounded(arrays.times_two_to(scale, by), dtype) for scale, by in ((rows, -across), (columns, across))
    )
    return tuple(xp.where(scale > 0, scale, xp.ones_like(scale)) for scale in (rows, columns))


def _rounded(values: Array) -> Array:
    xp = arrays.namespace(values)
    return xp.clip(xp.round(values), -LARGEST, LARGEST)


def _errors(error: Array, gram: Array) -> Array:
    """E_r D E_r' of every row, (count, size)."""
    return arrays.namespace(error).sum(error @ gram * error, axis=-1)


def _with_feedback(blocks: Array, gram: Array, step: Array) -> Array | None:
    """Whole numbers by columns from left to right; None where no factor of D^-1 can be had.

    With U'U = D^-1, U upper triangular, an error e in column k is made up for best by moving the columns after it by
    -e U_kj / U_kk. Rounding may have left D indefinite, which a little of the identity mends.

    Args:
        gram: D, of unit diagonal.
    """
    xp = arrays.namespace(blocks)
    eye = xp.eye(gram.shape[-1], dtype=gram.dtype, device=arrays.device(gram))
    lower = arrays.cholesky(xp.linalg.inv(gram + MENDING * eye))
    if lower is None:
        return None
    upper = arrays.transpose(lower)
    free, integers = xp.asarray(blocks, copy=True), xp.empty_like(blocks)
    for k in range(blocks.shape[-1]):
        integers[:, :, k] = _rounded(free[:, :, k] / step[:, :, k])
        error = (free[:, :, k] - integers[:, :, k] * step[:, :, k]) / upper[:, k, k][:, None]
        free[:, :, k:] -= error[:, :, None] * upper[:, k, k:][:, None, :]
    return integers


def with_feedback_naive(blocks: np.ndarray, gram: np.ndarray, step: np.ndarray) -> np.ndarray:
    """Twin of the loop of `round_rows` in NumPy: after each entry the rest of its row by least squares."""
    integers = np.empty_like(blocks)
    for block, matrix, steps, found in zip(blocks, gram, step, integers, strict=True):
        root = np.linalg.cholesky(matrix + MENDING * np.eye(len(matrix)))
        for row, scale, into in zip(block, steps, found, strict=True):
            free = row.copy()
            for k in range(len(row)):
                into[k] = np.clip(np.rint(free[k] / scale[k]), -LARGEST, LARGEST)
                done = (row[: k + 1] - into[: k + 1] * scale[: k + 1]) @ root[: k + 1]
                rest = np.linalg.lstsq(root[k + 1 :].T, done + row[k + 1 :] @ root[k + 1 :], rcond=None)[0]
                free[k + 1 :] = rest
    return integers
