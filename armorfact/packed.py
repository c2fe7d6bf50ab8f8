"""The N:M core as it is stored: the kept values, and their positions in a few bits each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from armorfact import arrays
from armorfact.pattern import Pattern

Array = Any


def pack_positions(positions: Array, bits: int) -> Array:
    """(rows, count) positions to (rows, ceil(count * bits / 8)) bytes, the first in the low bits."""
    xp = arrays.namespace(positions)
    per_byte = 8 // bits
    rows, count = positions.shape
    padding = -count % per_byte
    padded = xp.astype(positions, xp.uint8)
    if padding:
        filler = xp.zeros((rows, padding), dtype=xp.uint8, device=arrays.device(positions))
        padded = xp.concat([padded, filler], axis=1)
    codes = xp.reshape(padded, (rows, -1, per_byte))
    weights = [1 << (bits * k) for k in range(per_byte)]
    scale = xp.asarray(weights, dtype=xp.uint8, device=arrays.device(positions))
    return xp.astype(xp.sum(codes * scale, axis=-1, dtype=xp.int64), xp.uint8)


def unpack_positions(packed: Array, bits: int, count: int) -> Array:
    """The inverse of `pack_positions`: (rows, count) uint8."""
    xp = arrays.namespace(packed)
    per_byte = 8 // bits
    shifts = xp.asarray([bits * k for k in range(per_byte)], dtype=xp.uint8, device=arrays.device(packed))
    mask = xp.asarray((1 << bits) - 1, dtype=xp.uint8, device=arrays.device(packed))
    codes = (packed[..., None] >> shifts) & mask
    return xp.reshape(codes, (packed.shape[0], -1))[:, :count]


def _kept(matrix: Array, pattern: Pattern) -> tuple[Array, Array]:
    """The values and the packed positions of a matrix that obeys the pattern; see `Core.from_dense`."""
    if (most := pattern.most_kept(matrix)) > pattern.keep:
        raise ValueError(f"a group of the matrix holds {most} non-zeros, {pattern} allows {pattern.keep}")
    xp = arrays.namespace(matrix)
    rows, columns = matrix.shape
    grouped = xp.reshape(matrix, (rows, columns // pattern.group, pattern.group))
    order = xp.argsort(xp.astype(grouped == 0, xp.uint8), axis=-1, stable=True)
    positions = xp.sort(order[..., : pattern.keep], axis=-1)
    values = xp.take_along_axis(grouped, positions, axis=-1)
    flat = (rows, columns // pattern.group * pattern.keep)
    return xp.reshape(values, flat), pack_positions(xp.reshape(positions, flat), pattern.index_bits)


@dataclass(frozen=True)
class Core:
    """An N:M matrix (d_out, d_in).

    Args:
        values: (d_out, d_in * N / M), the kept values of each row from left to right: floating, or int8.
        packed: (d_out, bytes) uint8, the position of each value in its group, ascending, in
            ``pattern.index_bits`` bits each (2 for 2:4), the first in the low bits of its byte.
        pattern: N:M.
        columns: d_in.

    Examples:
        >>> import numpy as np
        >>> core = Core.from_dense(np.array([[0.0, 3.0, 0.0, 4.0, 5.0, 0.0, 0.0, 0.0]]), Pattern(2, 4))
        >>> core.values.tolist(), core.positions.tolist(), core.packed.shape
        ([[3.0, 4.0, 5.0, 0.0]], [[1, 3, 0, 1]], (1, 1))
        >>> core.dense().tolist()
        [[0.0, 3.0, 0.0, 4.0, 5.0, 0.0, 0.0, 0.0]]
    """

    values: Array
    packed: Array
    pattern: Pattern
    columns: int

    @classmethod
    def from_dense(cls, matrix: Array, pattern: Pattern) -> Core:
        """Pack a matrix (d_out, d_in) that obeys the pattern.

        Raises:
            ValueError: no matrix, or empty; columns that groups do not divide; a group with more than N non-zeros.
        """
        xp = arrays.namespace(matrix)
        if matrix.ndim != 2 or 0 in matrix.shape or matrix.shape[1] % pattern.group:
            raise ValueError(
                f"expected a non-empty matrix with a multiple of {pattern.group} columns, got {tuple(matrix.shape)}"
            )
        # A panel of rows at a time: places in groups are sorted as numbers of 64 bits.
        panels = [_kept(matrix[rows, :], pattern) for rows in arrays.panels(matrix.shape[0])]
        values, packed = (xp.concat(parts, axis=0) for parts in zip(*panels, strict=True))
        return cls(values, packed, pattern, matrix.shape[1])

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in)."""
        return self.values.shape[0], self.columns

    @property
    def positions(self) -> Array:
        """(d_out, d_in * N / M) uint8: the position of each value in its group."""
        return unpack_positions(self.packed, self.pattern.index_bits, self.values.shape[1])

    @property
    def mask(self) -> Array:
        """(d_out, d_in) bool: the positions that hold a value."""
        xp = arrays.namespace(self.values)
        return self._scatter(xp.ones_like(self.values)) != 0

    @property
    def places(self) -> Array:
        """(d_out, d_in * N / M) int64: the column of each value."""
        xp = arrays.namespace(self.packed)
        count = xp.arange(self.values.shape[1], dtype=xp.int64, device=arrays.device(self.packed))
        return xp.astype(self.positions, xp.int64) + count // self.pattern.keep * self.pattern.group

    def dense(self, dtype: Any = None) -> Array:
        """(d_out, d_in), in the dtype of the values if none is given."""
        xp = arrays.namespace(self.values)
        values = self.values if dtype is None else xp.astype(self.values, dtype, copy=False)
        return self._scatter(values)

    def _scatter(self, values: Array) -> Array:
        xp = arrays.namespace(values)
        rows, group = values.shape[0], self.pattern.group
        shape = (rows, self.columns // group, self.pattern.keep)
        places = xp.arange(group, dtype=xp.uint8, device=arrays.device(values))
        dense = xp.zeros((rows, self.columns // group, group), dtype=values.dtype, device=arrays.device(values))
        positions, values = xp.reshape(self.positions, shape), xp.reshape(values, shape)
        for k in range(self.pattern.keep):
            here = positions[..., k : k + 1] == places
            dense = xp.where(here, values[..., k : k + 1], dense)
        return xp.reshape(dense, (rows, self.columns))

    def apply(self, x: Array, rows_at_once: int = 1024) -> Array:
        """``x @ C'`` for x (..., d_in), unpacking a panel of rows at a time.

        Raises:
            TypeError: x is not floating. ValueError: it has another number of columns.
        """
        arrays.check_operand(x, self.columns)
        xp = arrays.namespace(x, self.values)
        outputs = []
        for lo in range(0, self.shape[0], rows_at_once):
            rows = slice(lo, min(lo + rows_at_once, self.shape[0]))
            panel = Core(self.values[rows, :], self.packed[rows, :], self.pattern, self.columns)
            outputs.append(x @ arrays.transpose(panel.dense(x.dtype)))
        return xp.concat(outputs, axis=-1)

    @property
    def nbytes(self) -> int:
        """Bytes of values and packed positions."""
        return arrays.nbytes(self.values) + arrays.nbytes(self.packed)
