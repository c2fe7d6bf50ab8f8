"""The canonical gauge: unit-norm columns of A and rows of B, their scale moved into C.

Scaling row r of C against column r of A, or column k of C against row k of B, leaves A C B as it
is; one fixed choice makes factors comparable and keeps A and B inside the range of float16.
"""

from __future__ import annotations

from typing import Any

from armorfact import arrays
from armorfact.problem import Factors

Array = Any


def canonical(factors: Factors) -> Factors:
    """The same product A C B with unit-norm columns of A and rows of B (zero ones stay zero)."""
    xp = arrays.namespace(factors.core)
    columns = arrays.norms(factors.left, -2)
    rows = arrays.norms(factors.right, -1)
    return Factors(
        left=factors.left / columns[:, None, :],
        core=xp.reshape(columns, (-1, 1)) * factors.core * xp.reshape(rows, (1, -1)),
        right=factors.right / rows[:, :, None],
    )
