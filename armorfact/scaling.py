"""How the objective asked for becomes the plain problem that a solver sees, and the way back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from armorfact import arrays, blocks
from armorfact.initial.nowag import normalize as nowag_normalization
from armorfact.problem import Factors

Array = Any


@dataclass(frozen=True)
class Scaling:
    """What turns a weighted or normalized objective into the plain one.

    The solver sees L (W_ij / (row_i column_j)), with L'L = G on the blocks of A. Factors go back
    with A's rows times row, B's columns times column, and L^-1 before A.

    Args:
        row: (d_out,) or None for ones; column: (d_in,) or None for ones.
        root: L, (d_out / block_out, block_out, block_out) float64, or None for identities.
    """

    row: Array | None = None
    column: Array | None = None
    root: Array | None = None

    @classmethod
    def of(cls, weight: Array, normalize: str | None, output_gram: Array | None) -> Scaling:
        """The scaling of the objective asked for, with G in float64: blocks, or its diagonal."""
        row = column = root = None
        if normalize == "nowag":
            found = nowag_normalization(weight)
            row, column = found.row, found.column
        if output_gram is not None and output_gram.ndim == 3:
            root = arrays.transpose(arrays.namespace(output_gram).linalg.cholesky(output_gram))
        elif output_gram is not None:
            rooted = arrays.namespace(weight).astype(output_gram**-0.5, weight.dtype)
            row = rooted if row is None else row * rooted
        return cls(row, column, root)

    def scaled(self, weight: Array, rows: slice = slice(None)) -> Array:
        """W, or those of its rows (whole blocks of A), as the solver sees it."""
        if self.column is not None:
            weight = weight / self.column
        if self.row is not None:
            weight = weight / self.row[rows][:, None]
        if self.root is None:
            return weight
        size = self.root.shape[-1]
        first = (rows.start or 0) // size
        root = self.root[first : first + weight.shape[0] // size, ...]
        return blocks.left_product(arrays.namespace(root).astype(root, weight.dtype, copy=False), weight)

    def into(self, factors: Factors) -> Factors:
        """Factors of W as factors of the scaled W.

        Rows and columns go into A and B; where those are identities, as at the start, into C, so
        that a solver starts at identities too. L goes into A.
        """
        left, core, right = factors.left, factors.core, factors.right
        if self.row is not None:
            left, core = left / _rows(self.row, left), core / self.row[:, None]
            left = left * _columns(self.row, left)
        if self.column is not None:
            right, core = right / _columns(self.column, right), core / self.column[None, :]
            right = right * _rows(self.column, right)
        if self.root is not None:
            left = arrays.namespace(left).astype(self.root @ arrays.float64(left), left.dtype, copy=False)
        return Factors(left, core, right)

    def into_wrappers(self, factors: Factors) -> Factors:
        """The inverse of `out_of`: all of it goes into A and B, and C stays as it is."""
        left, right = factors.left, factors.right
        if self.column is not None:
            right = right / _columns(self.column, right)
        if self.row is not None:
            left = left / _rows(self.row, left)
        if self.root is not None:
            left = arrays.namespace(left).astype(self.root @ arrays.float64(left), left.dtype, copy=False)
        return Factors(left, factors.core, right)

    def out_of(self, factors: Factors) -> Factors:
        """Factors of the scaled W as factors of W."""
        left, right = factors.left, factors.right
        if self.root is not None:
            left = arrays.solve(self.root, left)
        if self.row is not None:
            left = left * _rows(self.row, left)
        if self.column is not None:
            right = right * _columns(self.column, right)
        return Factors(left, factors.core, right)


def _rows(scale: Array, stack: Array) -> Array:
    return arrays.namespace(stack).reshape(scale, (stack.shape[0], stack.shape[1], 1))


def _columns(scale: Array, stack: Array) -> Array:
    return arrays.namespace(stack).reshape(scale, (stack.shape[0], 1, stack.shape[1]))
