"""The Gram matrix H of the inputs, full or diagonal: what the steps may ask of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from armorfact import arrays, blocks

Array = Any


@dataclass(frozen=True)
class FullGram:
    """H as a symmetric positive semidefinite matrix, (d_in, d_in)."""

    matrix: Array

    def multiply(self, left: Array) -> Array:
        """``left @ H``."""
        return left @ self.matrix

    def inner(self, x: Array) -> float:
        """``tr(x H x')``, one column panel at a time so that a float64 H never stands in memory."""
        xp = arrays.namespace(x)
        loss = 0.0
        for panel in arrays.panels(x.shape[1]):
            columns = xp.astype(self.matrix[:, panel], x.dtype, copy=False)
            loss += arrays.total((x @ columns) * x[:, panel])
        return loss

    def floored(self, floor: float) -> FullGram:
        """H + floor diag(H)."""
        return self._with(self.diagonal * (1 + floor))

    def lifted(self, least: Array) -> FullGram:
        """H with no positive entry of its diagonal below its own of ``least``, (d_in,)."""
        xp = arrays.namespace(self.matrix)
        faint = (self.diagonal > 0) & (self.diagonal < least)
        return self._with(xp.where(faint, least, self.diagonal)) if bool(xp.any(faint)) else self

    def _with(self, diagonal: Array) -> FullGram:
        xp = arrays.namespace(self.matrix)
        flat = xp.reshape(xp.asarray(self.matrix, copy=True), (-1,))
        flat[:: self.matrix.shape[0] + 1] = diagonal
        return FullGram(xp.reshape(flat, self.matrix.shape))

    @property
    def diagonal(self) -> Array:
        """(d_in,) the energy of each input channel."""
        xp = arrays.namespace(self.matrix)
        return xp.linalg.diagonal(self.matrix)

    def diagonal_blocks(self, size: int) -> Array:
        """H_jj, (d_in / size, size, size)."""
        return blocks.diagonal_blocks(self.matrix, size)


@dataclass(frozen=True)
class DiagonalGram:
    """H = diag(diagonal); no d_in x d_in array is ever formed."""

    diagonal: Array

    def multiply(self, left: Array) -> Array:
        """``left @ H``."""
        return left * self.diagonal

    def inner(self, x: Array) -> float:
        """``tr(x H x')``."""
        xp = arrays.namespace(x)
        return arrays.total(x * x * xp.astype(self.diagonal, x.dtype, copy=False))

    def diagonal_blocks(self, size: int) -> Array:
        """H_jj, (d_in / size, size, size)."""
        xp = arrays.namespace(self.diagonal)
        eye = xp.eye(size, dtype=self.diagonal.dtype, device=arrays.device(self.diagonal))
        return xp.reshape(self.diagonal, (-1, 1, size)) * eye


Gram = FullGram | DiagonalGram
