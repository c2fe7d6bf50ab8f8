"""`quantize_core`: the kept values in int8, their scales in A and B, which are then solved for once more."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from armorfact import arrays, driver, validate
from armorfact.driver import Budget, Progress
from armorfact.factorization import better
from armorfact.objective import Objective
from armorfact.packed import Core
from armorfact.problem import Factors
from armorfact.result import BlockDiagonal, Result
from armorfact.solvers.wrappers import Wrappers
from armorfact.statement import Statement
from armorfact.steps.rounding import balanced, equilibrated, error_costs, largest, round_core

Array = Any
Triple = tuple[BlockDiagonal, Core, BlockDiagonal]


def quantize_core(
    factorization: Result | Triple,
    W: Array,
    XXt: Array | None = None,
    *,
    normalize: str | None = None,
    row_weight: Array | None = None,
    output_gram: Array | None = None,
    max_sweeps: int | None = None,
    rtol: float | None = None,
    time_limit: float | None = None,
    callback: Callable[[Progress], object] | None = None,
) -> Result:
    r"""Round C to int8 and minimize :math:`\operatorname{tr}((W - ACB)\,H\,(W - ACB)^\top)` over A and B.

    A row and a column of C have a scale each, which A and B absorb exactly: nothing is stored beside the factors. The
    scales even out what rounding errors cost in the objective (`armorfact.steps.rounding`); then A and B take their
    exact steps in turn. The loss returned is never above that of plain rounding, one scale a row and nothing more.

    Args:
        factorization: what `factorize` returned, or (A, C, B).
        W: the weight to come close to, (d_out, d_in): the one that was factorized, or another, such as the product
            A C B itself.
        XXt, normalize, row_weight, output_gram: the objective, as of `factorize`.
        max_sweeps, rtol: of the alternation over A and B, 4 and 0.01 if None. time_limit, callback: as of `factorize`.

    Returns:
        A `Result` whose core holds int8 values from -127 to 127 on the supports of the core given, and A and B in the
        dtype they were given in. Its ``initial_loss`` is that of plain rounding.

    Raises:
        TypeError, ValueError: see `factorize`; a factorization of another shape than W, or with entries that are not
            finite.

    Examples:
        >>> import numpy as np
        >>> from armorfact import factorize
        >>> rng = np.random.default_rng(0)
        >>> weight, inputs = rng.standard_normal((32, 64)), rng.standard_normal((64, 256))
        >>> result = factorize(weight, inputs @ inputs.T, block=8)
        >>> rounded = quantize_core(result, weight, inputs @ inputs.T)
        >>> rounded.core.values.dtype, result.core.nbytes, rounded.core.nbytes
        (dtype('int8'), 8448, 1280)
        >>> rounded.loss <= rounded.initial_loss < 1.05 * result.loss
        True
    """
    left, core, right = validate.factorization(factorization)
    weight = validate.weight(W, core.pattern)
    validate.fits((left, core, right), weight)
    validate.callback(callback)
    solver = Wrappers()
    budget = Budget.of(solver, max_sweeps, rtol, time_limit)
    blocks = left.blocks.shape[-1], right.blocks.shape[-1]
    with arrays.plain_arithmetic(weight):
        stated = Statement.of(
            weight, XXt, core.pattern, blocks, normalize=normalize, row_weight=row_weight, output_gram=output_gram
        )
        dtype, objective = left.blocks.dtype, stated.objective
        whole = core.dense(validate.working_dtype(weight))  # C may be of more bits than the wrappers
        given = _into(objective, Factors(left.blocks, whole, right.blocks))
        if not given.finite():
            raise ValueError(f"the factorization leaves the range of {dtype} at the size of W: scale one of them")
        start, initial_loss = _start(stated, core, given, dtype)
        run = driver.run(solver, stated.problem, start.factors, budget, 0, callback, objective.units.loss)
        before, after = (_stored(objective, factors, dtype) for factors in (start.factors, run.factors))
        found, loss, _, why = better(objective, before, after)
        notes = (f"in {dtype} what A and B were before {why} and is returned",) if why else ()
        parts = BlockDiagonal(found.left), start.core, BlockDiagonal(found.right)
        return objective.result(parts, loss, initial_loss, run.history, run.status.noting(*notes))


@dataclass(frozen=True)
class _Rounded:
    """A core in int8 as it is stored, and the factors that it stands in, as a solver sees them."""

    core: Core
    factors: Factors


def _start(stated: Statement, layout: Core, given: Factors, dtype: Any) -> tuple[_Rounded, float]:
    """The better of plain rounding and of rounding by what errors cost, and the loss of the plain one."""
    xp = arrays.namespace(given.core)
    magnitude = xp.abs(given.core)
    costs = error_costs(stated.problem, given)
    rows, columns = equilibrated(costs[0][:, None] * magnitude * costs[1])
    plain = largest(magnitude, 1), xp.ones_like(columns)
    found = [_Rounded(*round_core(layout, given, *scales)) for scales in (plain, (rows / costs[0], columns / costs[1]))]
    losses = [stated.objective.loss(_stored(stated.objective, each.factors, dtype)) for each in found]
    return found[losses[1] < losses[0]], losses[0]


def _into(objective: Objective, factors: Factors) -> Factors:
    """Factors of W as a solver sees them; the scaling of the objective goes into A and B."""
    working = validate.working_dtype(objective.weight)
    return objective.scaling.into_wrappers(objective.units.into(factors.astype(working)))


def _stored(objective: Objective, factors: Factors, dtype: Any) -> Factors:
    """The inverse for a core of whole numbers, which stays: units and scaling go into A and B, rounded to ``dtype``."""
    return balanced(objective.scaling.out_of(factors), objective.units.weight).astype(dtype)
