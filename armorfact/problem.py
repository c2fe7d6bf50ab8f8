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
# Entries of A C B above this multiple of the largest of W are never accepted: none of the loss that they
# save in channels of hardly any energy is worth them.
MOST_GROWTH = 1000.0


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
        return Factors(*(arrays.rounded(x, dtype) for x in (self.left, self.core, self.right)))

    def detached(self) -> Factors:
        """The same factors without autograd history."""
        return Factors(*map(arrays.detached, (self.left, self.core, self.right)))

    def finite(self) -> bool:
        """Whether all entries are finite."""
        return all(map(arrays.all_finite, (self.left, self.core, self.right)))

    def in_proportion(self, largest: float) -> bool:
        """Whether no entry of A C B is above `MOST_GROWTH` times ``largest``, that of W.

        A C B is formed only where its bound, from the row sums of A and the column sums of B, is not enough.
        """
        xp = arrays.namespace(self.core)
        limit = MOST_GROWTH * largest
        rows, columns = xp.sum(xp.abs(self.left), axis=-1), xp.sum(xp.abs(self.right), axis=-2)
        if arrays.largest(rows) * arrays.largest(self.core) * arrays.largest(columns) <= limit:
            return True
        return arrays.largest(self.dense()) <= limit

    def replace(self, **changes: Array) -> Factors:
        """A copy with some of the factors exchanged."""
        return replace(self, **changes)


def row_panels(weight: Array, block_out: int) -> Iterator[tuple[slice, slice]]:
    """Whole blocks of A at a time: (their rows, the blocks themselves)."""
    at_once = max(PANEL_ROWS // block_out, 1)
    count = weight.shape[0] // block_out
    for lo in range(0, count, at_once):
        hi = min(lo + at_once, count)
        yield slice(lo * block_out, hi * block_out), slice(lo, hi)


def residual_panels(weight: Array, factors: Factors, exponent: int = 0) -> Iterator[tuple[slice, Array]]:
    """R = W - A C B in float64, a panel of rows at a time: (rows, R[rows]).

    W and C are multiplied by 2**exponent before anything is.
    """
    xp = arrays.namespace(weight)
    for rows, blocks_of_a in row_panels(weight, factors.left.shape[-1]):
        panel = Factors(factors.left[blocks_of_a, ...], factors.core[rows, :], factors.right).astype(xp.float64)
        panel = panel.replace(core=arrays.times_two_to(panel.core, exponent))
        yield rows, arrays.times_two_to(arrays.float64(weight[rows, :]), exponent) - panel.dense()


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

    @cached_property
    def largest(self) -> float:
        """The largest magnitude in W."""
        return arrays.largest(self.weight)

    def resolved(self, loss: float, factors: Factors) -> float:
        """``loss``, or where it is too small for the arithmetic of the steps, L computed anew.

        The steps know the loss to a few roundings of tr(W H W'); below that a difference of two
        large numbers may say zero, or less.
        """
        if loss >= 8 * arrays.epsilon(self.weight) * self.weight_energy:
            return loss
        return max(self.loss(factors), 0.0)

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
