r"""Round the core to int8: a scale a row and a scale a column, which A and B absorb exactly.

With :math:`C \approx \operatorname{diag}(u)\,Q\,\operatorname{diag}(v)`, Q integer, the product stays
:math:`A C B \approx (A\operatorname{diag}u)\,Q\,(\operatorname{diag}v\,B)`: no scale is ever stored. An error of
:math:`\delta` in the entry (r, k) of C costs :math:`T_{rr} S_{kk} \delta^2` by itself, with :math:`T = A^\top A` and
:math:`S = B H B^\top`, and rounding makes one of about :math:`u_r v_k / \sqrt{12}`. So the scales are chosen for
:math:`\tilde C = T^{1/2} C S^{1/2}` (the diagonals alone), where every error costs the same:

.. math:: \min_{u, v}\; \sum_{r,k} (u_r v_k)^2 \quad\text{with}\quad |\tilde C_{rk}| \le 127\,u_r v_k.
"""

from __future__ import annotations

from typing import Any

from armorfact import arrays
from armorfact.packed import Core
from armorfact.problem import Factors, Problem
from armorfact.steps.core import wrapped_gram

Array = Any

LARGEST = 127  # of a value: -128 has no counterpart
ROUNDS = 10  # of equilibration


def error_costs(problem: Problem, factors: Factors) -> tuple[Array, Array]:
    """The square roots of T_rr, (d_out,), and S_kk, (d_in,); one where nothing is seen of a row or column."""
    xp = arrays.namespace(factors.core)
    gram = wrapped_gram(problem, factors.right)
    energy = xp.clip(xp.reshape(xp.linalg.diagonal(gram), (-1,)), 0)
    rows = xp.reshape(arrays.norms(factors.left, -2), (-1,))
    return rows, xp.where(energy > 0, energy, xp.ones_like(energy)) ** 0.5


def equilibrated(magnitude: Array) -> tuple[Array, Array]:
    """Scales of rows and columns that bring a matrix of magnitudes into [0, 1], most rows and columns up to 1.

    Each round divides rows and columns by the roots of their largest entries (Ruiz, 2001). In the end all columns are
    given, and the least scales of the rows follow from them; then the least ones of the columns from those.

    Args:
        magnitude: (..., d_out, d_in), not negative.

    Returns:
        (..., d_out) and (..., d_in), positive.
    """
    xp = arrays.namespace(magnitude)
    rows, columns = xp.ones_like(magnitude[..., :, 0]), xp.ones_like(magnitude[..., 0, :])
    for _ in range(ROUNDS):
        scaled = magnitude / rows[..., :, None] / columns[..., None, :]
        rows, columns = rows * largest(scaled, -1) ** 0.5, columns * largest(scaled, -2) ** 0.5
    rows = largest(magnitude / columns[..., None, :], -1)
    return rows, largest(magnitude / rows[..., :, None], -2)


def largest(magnitude: Array, axis: int) -> Array:
    """The largest entries along an axis, as divisors: one where all are zero."""
    xp = arrays.namespace(magnitude)
    found = xp.max(magnitude, axis=axis)
    return xp.where(found > 0, found, xp.ones_like(found))


def round_core(layout: Core, factors: Factors, rows: Array, columns: Array) -> tuple[Core, Factors]:
    """The core in int8, and the factors with it: their A and B have the scales in them.

    Args:
        layout: whose supports the core is stored on. factors: with C in full.
        rows, columns: positive, in proportion to u and v; |C| is at most rows times columns.
    """
    xp = arrays.namespace(factors.core)
    values = xp.take_along_axis(factors.core / rows[:, None] / columns, layout.places, axis=1)
    whole = xp.astype(xp.clip(xp.round(values * LARGEST), -LARGEST, LARGEST), xp.int8)
    core = Core(whole, layout.packed, layout.pattern, layout.columns)
    size_out, size_in = factors.left.shape[-1], factors.right.shape[-1]
    return core, Factors(
        left=factors.left * xp.reshape(rows / LARGEST, (-1, 1, size_out)),
        core=core.dense(factors.core.dtype),
        right=factors.right * xp.reshape(columns, (-1, size_in, 1)),
    )


def balanced(factors: Factors, exponent: int) -> Factors:
    """Those of 2**exponent times the product, with A and B of about one size, which a narrow dtype can hold."""
    across = (arrays.exponent(factors.left) + exponent - arrays.exponent(factors.right)) // 2
    return factors.replace(
        left=arrays.times_two_to(factors.left, exponent - across),
        right=arrays.times_two_to(factors.right, across),
    )
