"""Products with block-diagonal matrices, held as (blocks, size, size)."""

from __future__ import annotations

from typing import Any

from armorfact import arrays

Array = Any


def split_rows(matrix: Array, size: int) -> Array:
    """(rows, columns) as (blocks, size, columns), a view."""
    xp = arrays.namespace(matrix)
    rows, columns = matrix.shape
    return xp.reshape(matrix, (rows // size, size, columns))


def join_rows(stack: Array) -> Array:
    """The inverse of `split_rows`."""
    xp = arrays.namespace(stack)
    blocks, size, columns = stack.shape
    return xp.reshape(stack, (blocks * size, columns))


def split_columns(matrix: Array, size: int) -> Array:
    """(rows, columns) as (blocks, rows, size), a view where the library has views."""
    xp = arrays.namespace(matrix)
    rows, columns = matrix.shape
    return xp.permute_dims(xp.reshape(matrix, (rows, columns // size, size)), (1, 0, 2))


def join_columns(stack: Array) -> Array:
    """The inverse of `split_columns`."""
    xp = arrays.namespace(stack)
    blocks, rows, size = stack.shape
    return xp.reshape(xp.permute_dims(stack, (1, 0, 2)), (rows, blocks * size))


def split_grid(matrix: Array, rows: int, columns: int) -> Array:
    """(d_out, d_in) as (I, J, rows, columns)."""
    xp = arrays.namespace(matrix)
    d_out, d_in = matrix.shape
    grid = xp.reshape(matrix, (d_out // rows, rows, d_in // columns, columns))
    return xp.permute_dims(grid, (0, 2, 1, 3))


def join_grid(grid: Array) -> Array:
    """The inverse of `split_grid`."""
    xp = arrays.namespace(grid)
    down, across, rows, columns = grid.shape
    return xp.reshape(xp.permute_dims(grid, (0, 2, 1, 3)), (down * rows, across * columns))


def left_product(blocks: Array, matrix: Array) -> Array:
    """diag(blocks) @ matrix."""
    return join_rows(blocks @ split_rows(matrix, blocks.shape[-1]))


def right_product(matrix: Array, blocks: Array) -> Array:
    """matrix @ diag(blocks)."""
    return join_columns(split_columns(matrix, blocks.shape[-1]) @ blocks)


def diagonal_blocks(matrix: Array, size: int) -> Array:
    """The (size, size) blocks on the diagonals of (batches of) square matrices, (..., blocks, size, size)."""
    xp = arrays.namespace(matrix)
    *batch, rows, columns = matrix.shape
    grid = xp.reshape(matrix, (*batch, rows // size, size, columns // size, size))
    first = len(batch)
    outer = tuple(range(first))
    on_diagonal = xp.linalg.diagonal(xp.permute_dims(grid, (*outer, first + 1, first + 3, first, first + 2)))
    return xp.permute_dims(on_diagonal, (*outer, first + 2, first, first + 1))


def identity_blocks(count: int, size: int, like: Array) -> Array:
    """``count`` identity matrices of dtype and device of ``like``."""
    xp = arrays.namespace(like)
    eye = xp.eye(size, dtype=like.dtype, device=arrays.device(like))
    return xp.tile(eye[None, :, :], (count, 1, 1))


def dense(blocks: Array) -> Array:
    """diag(blocks) as an ordinary square matrix."""
    xp = arrays.namespace(blocks)
    count, size, _ = blocks.shape
    eye = xp.eye(count, dtype=blocks.dtype, device=arrays.device(blocks))
    grid = xp.reshape(eye, (count, 1, count, 1)) * xp.reshape(blocks, (count, size, 1, size))
    return xp.reshape(grid, (count * size, count * size))
