"""The objective as it was asked for: what the factors that are returned are measured in."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from armorfact import arrays, validate
from armorfact.driver import Sweep
from armorfact.gram import Gram
from armorfact.packed import Core
from armorfact.problem import Factors, residual_panels, row_panels
from armorfact.result import BlockDiagonal, Result
from armorfact.scaling import Scaling
from armorfact.status import Status

Array = Any


@dataclass(frozen=True)
class Units:
    """The powers of two that bring the largest entries of W, H and the row weights to about 1.

    Multiplying by a power of two is exact, so a layer of any scale is solved as the same layer at
    scale 1 and the factors are scaled back.

    Args:
        weight, gram, rows: exponents; those of the squares, gram and rows, are even.
        normalized: the residual is divided by norms of W, so that its own unit is 1.
    """

    weight: int
    gram: int
    rows: int
    normalized: bool

    def loss(self, value: float) -> float:
        """A loss in these units as a loss of W; infinite where that is no float."""
        try:
            return math.ldexp(value, (0 if self.normalized else 2 * self.weight) + self.gram + self.rows)
        except OverflowError:
            return math.inf

    def into(self, factors: Factors) -> Factors:
        """Factors of W as factors of W in these units."""
        return factors.replace(core=arrays.times_two_to(factors.core, -self.weight))

    def out_of(self, factors: Factors) -> Factors:
        """The inverse of `into`; infinite where C leaves the range of its dtype."""
        return factors.replace(core=arrays.times_two_to(factors.core, self.weight))


@dataclass(frozen=True)
class Objective:
    """tr(R H R'), R = W - A C B, in float64, with W, H and the factors as the user has them.

    Args:
        weight: W, (d_out, d_in), as given.
        gram: H as given; ``units`` keeps its products in range.
        scaling: of the rows and columns of R, in units.
        units: `loss` is in these units; ``units.loss`` takes it back.
    """

    weight: Array
    gram: Gram
    scaling: Scaling
    units: Units

    def loss(self, factors: Factors) -> float:
        """The loss of ``factors``; below zero only as far as H has a negative eigenvalue."""
        residuals = residual_panels(self.weight, factors, -self.units.weight)
        return sum(self._inner(rows, residual) for rows, residual in residuals)

    def result(
        self,
        parts: tuple[BlockDiagonal, Core, BlockDiagonal],
        loss: float,
        initial_loss: float,
        history: tuple[Sweep, ...],
        status: Status,
    ) -> Result:
        """Factors as they are returned, with their loss and that of the initialization, both in ``units``."""
        left, core, right = parts
        losses = loss, initial_loss, self.weight_loss(left.blocks.shape[-1])
        loss, initial_loss, weight_loss = (self.units.loss(max(each, 0.0)) for each in losses)
        size = arrays.nbytes(self.weight)
        return Result(left, core, right, loss, initial_loss, weight_loss, history, status, size)

    def usable(self, factors: Factors) -> bool:
        """Whether all entries are finite and those of A C B in proportion to those of W."""
        if not factors.finite():
            return False
        working = validate.working_dtype(self.weight)
        largest = math.ldexp(arrays.largest(self.weight), -self.units.weight)
        return self.units.into(factors.astype(working)).in_proportion(largest)

    def weight_loss(self, block_out: int) -> float:
        """tr(W H W'), the loss of the zero matrix."""
        return sum(
            self._inner(rows, arrays.times_two_to(arrays.float64(self.weight[rows, :]), -self.units.weight))
            for rows, _ in row_panels(self.weight, block_out)
        )

    def _inner(self, rows: slice, residual: Array) -> float:
        return self.gram.inner(arrays.times_two_to(self.scaling.scaled(residual, rows), -self.units.gram // 2))
