"""Solvers: each contributes ``init`` and ``step``; the driver owns the loop."""

from armorfact.solvers.adam import Adam
from armorfact.solvers.exact import Exact
from armorfact.solvers.gradient import Gradient
from armorfact.solvers.protocol import Best, Solver, State

__all__ = ["Adam", "Best", "Exact", "Gradient", "Solver", "State"]
