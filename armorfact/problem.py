"""The optimization problem: minimize tr((W - A C B) H (W - A C B)') over A, C, B."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from armorfact import arrays, blocks
from armorfact.gram import Gram
from armorfact.pattern import Pattern

Array = Any

# Rows whose residual stands in float64 at a time.
PANEL_ROWS = 256


@dataclass(frozen=True)
class Factors:
    """A point of the search: the blocks of A and B, and C as a dense matrix that obeys N:M.

    Args:
        left: A, (d_out / block_out, block_out, block_out).
        core: C, (d_out, d_in).
        right: B, (d_in / block_in, block_in, block_in).
    """

    left: Array
    core: Array
    right: Array

    def dense(self) -> Array:
        """A C B, (d_out, d_in)."""
        return blocks.left_product(self.left, blocks.right_product(self.core, self.right))

    def astype(self, dtype: Any) -> Factors:
        """The same factors rounded to ``dtype``."""
        xp = arrays.namespace(self.core)
        return Factors(*(xp.astype(x, dtype, copy=False) for x in (self.left, self.core, self.right)))

    def replace(self, **changes: Array) -> Factors:
        """A copy with some of the factors exchanged."""
        return replace(self, **changes)


def residual_panels(weight: Array, factors: Factors) -> Iterator[tuple[slice, Array]]:
    """R = W - A C B in float64, a panel of whole blocks of A at a time: (rows, R[rows])."""
    xp = arrays.namespace(weight)
    count, size, _ = factors.left.shape
    at_once = max(PANEL_ROWS // size, 1)
    for lo in range(0, count, at_once):
        hi = min(lo + at_once, count)
        rows = slice(lo * size, hi * size)
        panel = Factors(factors.left[lo:hi, ...], factors.core[rows, :], factors.right).astype(xp.float64)
        yield rows, arrays.float64(weight[rows, :]) - panel.dense()


@dataclass(frozen=True)
class Problem:
    """What a solver is given: minimize L = tr(R H R'), R = W - A C B, over factors of these shapes.

    Args:
        weight: W, (d_out, d_in), float32 or float64.
        gram: H, see `armorfact.gram`.
        pattern: the N:M pattern that C obeys.
        block_out: size of the blocks of A; divides d_out.
        block_in: size of the blocks of B; divides d_in, and the pattern's group divides it.
    """

    weight: Array
    gram: Gram
    pattern: Pattern
    block_out: int
    block_in: int

    @cached_property
    def weight_gram(self) -> Array:
        """W H, (d_out, d_in): formed once, it turns every later gradient into a product with C B H."""
        return self.gram.multiply(self.weight)

    @cached_property
    def weight_energy(self) -> float:
        """tr(W H W'), the loss of the zero matrix, which relative losses divide by."""
        return arrays.total(self.weight * self.weight_gram)

    def residual_gram(self, factors: Factors) -> Array:
        """R H, (d_out, d_in): every gradient of L is a product of the factors with it."""
        return self.gram.multiply(self.weight - factors.dense())

    def loss(self, factors: Factors) -> float:
        """L in float64, straight from its definition."""
        return sum(self.gram.inner(residual) for _, residual in residual_panels(self.weight, factors))

    def identity_wrapped(self, core: Array) -> Factors:
        """The factors I, ``core``, I: where every initialization starts."""
        d_out, d_in = self.weight.shape
        return Factors(
            left=blocks.identity_blocks(d_out // self.block_out, self.block_out, self.weight),
            core=core,
            right=blocks.identity_blocks(d_in // self.block_in, self.block_in, self.weight),
        )
