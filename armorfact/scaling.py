"""How the objective asked for becomes the plain problem that a solver sees, and the way back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from armorfact import arrays
from armorfact.initial.nowag import normalize as nowag_normalization
from armorfact.problem import Factors

Array = Any


@dataclass(frozen=True)
class Scaling:
    """Row and column scales that turn a weighted or normalized objective into the plain one.

    The solver sees W_ij / (row_i column_j); factors go back with A's rows times row and B's
    columns times column.

    Args:
        row: (d_out,) or None for ones; column: (d_in,) or None for ones.
    """

    row: Array | None
    column: Array | None

    @classmethod
    def of(cls, weight: Array, normalize: str | None, row_weight: Array | None) -> Scaling:
        """The scaling of the objective asked for."""
        row = column = None
        if normalize == "nowag":
            found = nowag_normalization(weight)
            row, column = found.row, found.column
        if row_weight is not None:
            row = row_weight**-0.5 if row is None else row * row_weight**-0.5
        return cls(row, column)

    def scaled(self, weight: Array, rows: slice = slice(None)) -> Array:
        """W, or those of its rows, as the solver sees it."""
        if self.column is not None:
            weight = weight / self.column
        return weight if self.row is None else weight / self.row[rows][:, None]

    def into(self, factors: Factors) -> Factors:
        """Factors of W as factors of the scaled W.

        The scales go into A and B; where those are identities, as at the start, into C, so that a
        solver starts at identities too.
        """
        left, core, right = factors.left, factors.core, factors.right
        if self.row is not None:
            left, core = left / self._rows(left), core / self.row[:, None]
            left = left * self._columns(self.row, left)
        if self.column is not None:
            right, core = right / self._columns(self.column, right), core / self.column[None, :]
            right = right * self._rows_of(self.column, right)
        return Factors(left, core, right)

    def out_of(self, factors: Factors) -> Factors:
        """Factors of the scaled W as factors of W."""
        left, right = factors.left, factors.right
        if self.row is not None:
            left = left * self._rows(left)
        if self.column is not None:
            right = right * self._columns(self.column, right)
        return Factors(left, factors.core, right)

    def _rows(self, stack: Array) -> Array:
        return self._rows_of(self.row, stack)

    @staticmethod
    def _rows_of(scale: Array, stack: Array) -> Array:
        return arrays.namespace(stack).reshape(scale, (stack.shape[0], stack.shape[1], 1))

    @staticmethod
    def _columns(scale: Array, stack: Array) -> Array:
        return arrays.namespace(stack).reshape(scale, (stack.shape[0], 1, stack.shape[1]))
