"""What `factorize`, `quantize_core` and `quantize_wrappers` return."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from armorfact import arrays, blocks
from armorfact.driver import Sweep
from armorfact.packed import Core
from armorfact.problem import Factors
from armorfact.status import Status

Array = Any


@dataclass(frozen=True)
class BlockDiagonal:
    """A block-diagonal square matrix.

    Args:
        blocks: (count, size, size), floating, or int8 between scales.
        rows, columns: (count, size) each, what every row and every column is to be multiplied with; None for ones.
    """

    blocks: Array
    rows: Array | None = None
    columns: Array | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(count * size, count * size)."""
        count, size, _ = self.blocks.shape
        return count * size, count * size

    @property
    def dtype(self) -> Any:
        """Of the scales, or of the blocks where there are none."""
        return next(held for held in (self.rows, self.columns, self.blocks) if held is not None).dtype

    def scaled(self, dtype: Any = None) -> Array:
        """(count, size, size) with the scales multiplied in, in `dtype` if none is given."""
        xp, dtype = arrays.namespace(self.blocks), self.dtype if dtype is None else dtype
        found = xp.astype(self.blocks, dtype, copy=False)
        if self.rows is not None:
            found = found * xp.astype(self.rows, dtype, copy=False)[..., :, None]
        if self.columns is not None:
            found = found * xp.astype(self.columns, dtype, copy=False)[..., None, :]
        return found

    def dense(self) -> Array:
        """The matrix with its zeros, for inspection."""
        return blocks.dense(self.scaled())

    def apply(self, x: Array) -> Array:
        """``x @ self.dense().T`` for x (..., count * size).

        Raises:
            TypeError: x is not floating. ValueError: it has another number of columns.
        """
        arrays.check_operand(x, self.shape[1])
        xp = arrays.namespace(x, self.blocks)
        flat = xp.reshape(x, (-1, x.shape[-1]))
        product = blocks.right_product(flat, arrays.transpose(self.scaled(x.dtype)))
        return xp.reshape(product, x.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the blocks and the scales."""
        return sum(arrays.nbytes(held) for held in (self.blocks, self.rows, self.columns) if held is not None)


@dataclass(frozen=True, repr=False)
class Result:
    """A factorization W ~ A C B and how it came about.

    ``loss``, ``initial_loss`` and ``weight_loss`` are evaluated in float64 with W and H as given and
    the factors in the dtype they are held in: tr((W - A C B) H (W - A C B)'), with the normalization
    and output weights that were asked for; 0 where rounding has made H's own value negative.

    Args:
        left: A. core: C. right: B.
        loss: of this factorization.
        initial_loss: of the initialization, rounded to the same dtype.
        weight_loss: of the zero matrix, tr(W H W').
        history: the accepted sweeps, sweep 0 being the start; their losses never rise. They are the solver's own,
            before its factors are rounded to the dtype of W, and in an H of too few tokens with the floor that
            keeps it definite.
        status: why the run ended: a sentence, and as ``status.ending`` an `Ending`.
        original_nbytes: bytes of W.
    """

    left: BlockDiagonal
    core: Core
    right: BlockDiagonal
    loss: float
    initial_loss: float
    weight_loss: float
    history: tuple[Sweep, ...]
    status: Status
    original_nbytes: int

    @property
    def factors(self) -> Factors:
        """A, C (dense, in their dtype) and B as arrays: what a warm start takes."""
        return Factors(self.left.scaled(), self.core.dense(self.left.dtype), self.right.scaled())

    @property
    def relative_loss(self) -> float:
        """The loss over that of the zero matrix; 0 where both vanish, infinite where that alone does."""
        if not self.weight_loss:
            return math.inf if self.loss else 0.0
        return self.loss / self.weight_loss

    def dense(self) -> Array:
        """A C B, (d_out, d_in)."""
        return self.factors.dense()

    def apply(self, x: Array) -> Array:
        """``x @ (A C B)'`` for x (..., d_in), as three thin products; A C B is never formed.

        Raises:
            TypeError: x is not floating. ValueError: it has another number of columns.
        """
        return self.left.apply(self.core.apply(self.right.apply(x)))

    @property
    def nbytes(self) -> int:
        """Bytes of the wrappers, the kept values and the packed positions."""
        return self.left.nbytes + self.core.nbytes + self.right.nbytes

    @property
    def compression(self) -> float:
        """Bytes of W over `nbytes`; above 1 is smaller."""
        return self.original_nbytes / self.nbytes

    def __repr__(self) -> str:
        d_out, d_in = self.core.shape
        return (
            f"Result({d_out}x{d_in}, {self.core.pattern}, "
            f"block=({self.left.blocks.shape[-1]}, {self.right.blocks.shape[-1]}), "
            f"relative loss {self.relative_loss:.4g} "
            f"(initial {self.initial_loss / (self.weight_loss or 1.0):.4g}), "
            f"{self.nbytes:,} bytes, {1 / self.compression:.3f} of dense; {self.status})"
        )
