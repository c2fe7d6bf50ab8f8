"""The array layer: the one place that knows which library an array came from.

Everything else takes ``xp = namespace(array)`` and writes to the array API standard.
NumPy and CPU Torch arrays share memory with NumPy (`as_numpy`), so that compiled kernels serve
both; other devices run the same mathematics as batched array operations.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import array_api_compat
import numpy as np

from armorfact.arrays.precision import full_precision

Array = Any

PANEL = 256  # rows that are copied at a time


def is_array(value: Any) -> bool:
    """Whether ``value`` is an array of a library that array-api-compat knows, and that can be written to."""
    fixed = array_api_compat.is_jax_array(value) or array_api_compat.is_dask_array(value)
    special = isinstance(value, np.ma.MaskedArray | np.matrix)  # whose products are others
    return array_api_compat.is_array_api_obj(value) and not fixed and not special


def is_dense(array: Array) -> bool:
    """Whether an array holds all its entries, in memory: Torch has others, sparse ones and those of shape alone."""
    return not array_api_compat.is_torch_array(array) or (str(array.layout) == "torch.strided" and not array.is_meta)


def integer(value: Any, name: str) -> int:
    """``value`` as a Python integer; NumPy's integers count, truth values and whole floats do not.

    Raises:
        TypeError: not an integer.
    """
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r}") from None


def namespace(*values: Any) -> Any:
    """The array API namespace common to the arrays given.

    Raises:
        TypeError: the arrays come from different libraries.
    """
    return array_api_compat.array_namespace(*values)


def device(array: Array) -> Any:
    """The device an array lives on."""
    return array_api_compat.device(array)


def library(array: Array) -> str:
    """The name of the library an array came from, for messages."""
    return namespace(array).__name__.rpartition(".")[2]


@contextmanager
def plain_arithmetic(array: Array) -> Iterator[None]:
    """Products in the arrays' own precision, whatever Torch is set to, and no warning of what overflows.

    That is not finite, and what is not finite is never accepted.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        if array_api_compat.is_torch_array(array):
            with full_precision(), namespace(array).autocast(array.device.type, enabled=False):
                yield
        else:
            yield


def detached(array: Array) -> Array:
    """The array without autograd history (Torch); others pass through."""
    return array.detach() if array_api_compat.is_torch_array(array) else array


def native(array: Array) -> Array:
    """The array in this machine's order of bytes (NumPy); others pass through."""
    if array_api_compat.is_numpy_array(array) and not array.dtype.isnative:
        return array.astype(array.dtype.newbyteorder("="))
    return array


def check_operand(x: Array, columns: int) -> None:
    """Raise TypeError unless x is floating, and ValueError unless it has so many columns."""
    if not namespace(x).isdtype(x.dtype, "real floating"):
        raise TypeError(f"x must have a real floating dtype, got {x.dtype}: convert it")
    if not x.ndim or x.shape[-1] != columns:
        raise ValueError(f"x must have {columns} columns, got shape {tuple(x.shape)}")


def shares_memory_with_numpy(array: Array) -> bool:
    """Whether `as_numpy` is free: NumPy itself, and Torch on the CPU."""
    if array_api_compat.is_numpy_array(array):
        return True
    return array_api_compat.is_torch_array(array) and array.device.type == "cpu"


def as_numpy(array: Array) -> np.ndarray:
    """A NumPy view of an array for which `shares_memory_with_numpy` holds."""
    return np.asarray(array)


def float64(array: Array) -> Array:
    """The array in float64, for small solves and reported losses."""
    xp = namespace(array)
    return xp.astype(array, xp.float64, copy=False)


def epsilon(array: Array) -> float:
    """Machine epsilon of the array's dtype."""
    return float(namespace(array).finfo(array.dtype).eps)


def smallest(array: Array) -> float:
    """The smallest positive number of the array's dtype."""
    return float(namespace(array).finfo(array.dtype).smallest_normal) * epsilon(array)


def total(array: Array) -> float:
    """The sum of all entries, accumulated in float64."""
    xp = namespace(array)
    return float(xp.sum(array, dtype=xp.float64))


def panels(rows: int) -> Iterator[slice]:
    """Slices of `PANEL` rows that cover so many."""
    return (slice(lo, min(lo + PANEL, rows)) for lo in range(0, rows, PANEL))


def all_finite(array: Array) -> bool:
    """Whether no entry is NaN or infinite; looked at in panels, as libraries make copies to tell."""
    xp = namespace(array)
    return all(bool(xp.all(xp.isfinite(array[rows, ...]))) for rows in panels(array.shape[0]))


def flipped(matrix: Array, dtype: Any) -> Array:
    """The rows and columns of a matrix in reverse order, in ``dtype``; beside the result, only a panel is copied."""
    xp = namespace(matrix)
    count = matrix.shape[0]
    result = xp.empty(matrix.shape, dtype=dtype, device=device(matrix))
    for rows in panels(count):
        last = matrix[count - rows.stop : count - rows.start, :]
        result[rows, :] = xp.astype(xp.flip(last), dtype, copy=False)
    return result


def largest(array: Array) -> float:
    """The largest magnitude among the entries."""
    xp = namespace(array)
    return float(xp.max(xp.abs(array)))


def exponent(array: Array) -> int:
    """The e with ``2**(e - 1) <= largest(array) < 2**e``; 0 where all entries are zero."""
    return math.frexp(largest(array))[1]


def times_two_to(array: Array, exponent: int) -> Array:
    """``array * 2**exponent``, exact as long as it stays in the range of the dtype; infinite beyond.

    The factor is applied in two halves: 2**128 itself is no float32.
    """
    if exponent == 0:
        return array
    half = exponent // 2
    with np.errstate(over="ignore"):
        return array * 2.0**half * 2.0 ** (exponent - half)


def rounded(array: Array, dtype: Any) -> Array:
    """The array in ``dtype``, infinite where its range ends; not copied where nothing changes."""
    with np.errstate(over="ignore"):
        return namespace(array).astype(array, dtype, copy=False)


def transpose(array: Array) -> Array:
    """The last two axes exchanged (a view where the library has views)."""
    return namespace(array).matrix_transpose(array)


def norms(array: Array, axis: int) -> Array:
    """The 2-norms along an axis, as divisors: one where all entries are zero. Squares stay in range."""
    xp = namespace(array)
    size = xp.max(xp.abs(array), axis=axis, keepdims=True)
    size = xp.where(size > 0, size, xp.ones_like(size))
    found = xp.linalg.vector_norm(array / size, axis=axis) * xp.squeeze(size, axis=axis)
    return xp.where(found > 0, found, xp.ones_like(found))


def nbytes(array: Array) -> int:
    """Bytes of the entries."""
    xp = namespace(array)
    information = xp.iinfo if xp.isdtype(array.dtype, "integral") else xp.finfo
    bits = information(array.dtype).bits
    return math.prod(array.shape) * bits // 8


def solve(matrix: Array, rhs: Array) -> Array:
    """Solve ``matrix @ x = rhs`` in float64 for (batches of) regular matrices.

    Returns ``x`` in the dtype of ``rhs``.
    """
    xp = namespace(matrix, rhs)
    solution = xp.linalg.solve(float64(matrix), float64(rhs))
    return xp.astype(solution, rhs.dtype, copy=False)


def cholesky(matrix: Array, overwrite: bool = False) -> Array | None:
    """The lower Cholesky factor, or None where the matrix is not positive definite.

    Args:
        matrix: its lower triangle is looked at.
        overwrite: it is not needed any more. Torch then puts the factor in its place, if it is stored by columns.
    """
    xp = namespace(matrix)
    if not all_finite(matrix):
        return None
    place = {"out": matrix} if overwrite and array_api_compat.is_torch_array(matrix) else {}
    try:
        factor = xp.linalg.cholesky(matrix, **place)
    except getattr(xp.linalg, "LinAlgError", np.linalg.LinAlgError):
        return None
    # CuPy reports failure as NaN instead of raising. From wherever it begins, it reaches the diagonal.
    return factor if bool(xp.all(xp.isfinite(xp.linalg.diagonal(factor)))) else None
