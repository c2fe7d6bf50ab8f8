"""`factorize`: the front door. It checks, scales, initializes, runs a solver, and measures."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from armorfact import arrays, driver, sizes, validate
from armorfact.driver import Budget, Progress
from armorfact.gauge import canonical
from armorfact.initial import METHODS
from armorfact.initial.sparsegpt import within_range
from armorfact.objective import Objective
from armorfact.packed import Core
from armorfact.pattern import Pattern
from armorfact.problem import Factors, Problem
from armorfact.result import BlockDiagonal, Result
from armorfact.solvers import Adam, Exact, Gradient, Solver
from armorfact.statement import Statement

Array = Any
Notes = tuple[str, ...]

SOLVERS: dict[str, type[Exact | Gradient | Adam]] = {"exact": Exact, "gradient": Gradient, "adam": Adam}


def factorize(
    W: Array,
    XXt: Array | None = None,
    *,
    block: int | tuple[int, int] | str = "auto",
    pattern: str | Pattern = "2:4",
    init: str | Array | Result = "sparsegpt",
    solver: str | Solver = "exact",
    normalize: str | None = None,
    row_weight: Array | None = None,
    output_gram: Array | None = None,
    max_sweeps: int | None = None,
    rtol: float | None = None,
    time_limit: float | None = None,
    callback: Callable[[Progress], object] | None = None,
    seed: int = 0,
) -> Result:
    r"""Minimize :math:`\operatorname{tr}((W - ACB)\,H\,(W - ACB)^\top)` over block-diagonal A, B and an N:M core C.

    :math:`H = XX^\top` is the Gram matrix of the layer's inputs, so this is :math:`\|(W - ACB)X\|_F^2`. The loss
    returned is never above that of the initialization (ARMOR, arXiv 2510.05528, Theorem 3.1).

    Args:
        W: the weight, (d_out, d_in), any real floating dtype; it is not modified.
        XXt: H, (d_in, d_in); a (d_in,) vector is its diagonal; None is the identity.
        block: size of the blocks of A and B, a pair (block_out, block_in), or "auto": the largest
            size up to 128 that divides each dimension (for d_in, a multiple of M).
        pattern: "N:M".
        init: "sparsegpt", "wanda", "nowag", "magnitude", a boolean mask (d_out, d_in) with at most
            N True in each group, or an earlier `Result` of the same shapes (warm start).
        solver: "exact", "gradient", "adam", or an object with the methods of `armorfact.Solver`.
        normalize: "nowag" measures the residual on W with unit-norm columns and then rows, the
            paper's objective (together with a diagonal XXt); None measures it on W itself.
        row_weight: (d_out,) positive importance of each output row, a factor of its squared error.
        output_gram: G, the importance of the outputs, for the objective tr(G (W - ACB) H (W - ACB)'):
            (d_out / block_out, block_out, block_out), a positive definite matrix for each block of
            A, or its diagonal (d_out,), which is ``row_weight``.
        max_sweeps, rtol: the solver's own defaults if None.
        time_limit: seconds of the solver after which no further sweep starts; it makes one sweep at least.
        callback: called with a `Progress` after every sweep; a true return value stops the run.
        seed: of the solvers that draw at random.

    Returns:
        A `Result` whose arrays have the library, dtype and device of W.

    Raises:
        TypeError: arguments of the wrong type, integer or complex dtypes, two array libraries.
        ValueError: wrong shapes, sizes that blocks or groups do not divide, NaN or infinite
            entries, an XXt that is not symmetric positive semidefinite, an output_gram that is not
            positive definite, another device than that of W, negative budgets, unknown names.

    Examples:
        >>> import numpy as np
        >>> rng = np.random.default_rng(0)
        >>> weight, inputs = rng.standard_normal((8, 16)), rng.standard_normal((16, 100))
        >>> result = factorize(weight, inputs @ inputs.T, block=(4, 8), max_sweeps=10)
        >>> result.left.blocks.shape, result.core.values.shape, result.right.blocks.shape
        ((2, 4, 4), (8, 8), (2, 8, 8))
        >>> result.loss < result.initial_loss < result.weight_loss
        True
        >>> print(result.status)
        sweep limit of 10 reached
    """
    pattern = Pattern.parse(pattern)
    weight = validate.weight(W, pattern)
    block_out, block_in = sizes.blocks(block, weight.shape, pattern)
    validate.solver(solver, tuple(SOLVERS))
    algorithm = SOLVERS[solver]() if isinstance(solver, str) else solver
    budget = Budget.of(algorithm, max_sweeps, rtol, time_limit)
    seed = validate.seed(seed)
    validate.init(init, weight, pattern, (block_out, block_in), tuple(METHODS))
    validate.callback(callback)
    with arrays.plain_arithmetic(weight):
        stated = Statement.of(
            weight,
            XXt,
            pattern,
            (block_out, block_in),
            normalize=normalize,
            row_weight=row_weight,
            output_gram=output_gram,
        )
        objective, problem = stated.objective, stated.problem
        start, notes = _start(init, stated)
        begun = objective.scaling.into(start)
        run = driver.run(algorithm, problem, begun, budget, seed, callback, objective.units.loss)
        return _measured(objective, problem, start, run, notes)


def _start(init: Any, stated: Statement) -> tuple[Factors, Notes]:
    """The starting factors of the scaled W, and what the status has to say about them."""
    weight, gram, problem, objective = stated.weight, stated.gram, stated.problem, stated.objective
    if isinstance(init, Result):
        given = objective.units.into(init.factors.detached().astype(weight.dtype))
        if not given.finite():
            raise ValueError("the warm start and W are too far apart in size for one scale: scale one of them")
        return given, ()
    if not isinstance(init, str):
        xp = arrays.namespace(weight)
        return problem.identity_wrapped(xp.where(init, weight, xp.zeros_like(weight))), ()
    pruned = METHODS[init](weight, gram, problem.pattern)
    if init != "sparsegpt":
        return problem.identity_wrapped(pruned), ()
    home = objective.units.weight, objective.weight.dtype
    core, rows = within_range(pruned, weight, gram, problem.pattern, home)
    note = f"{rows} rows that SparseGPT takes out of the range of {home[1]} start from Wanda's choice"
    return problem.identity_wrapped(core), (note,) if rows else ()


def better(objective: Objective, initial: Factors, found: Factors) -> tuple[Factors, float, float, str]:
    """Of two factorizations as they are returned the one with the smaller loss, its loss and that of ``initial``.

    Returns:
        The last is why ``found`` is not the one, or empty. What is out of range is never the one.
    """
    initial_loss = objective.loss(initial)
    usable = objective.usable(found)
    loss = objective.loss(found) if usable else math.inf
    if loss <= initial_loss:
        return found, loss, initial_loss, ""
    return initial, initial_loss, initial_loss, "has the smaller loss" if usable else "alone stays in range"


def _measured(objective: Objective, problem: Problem, start: Factors, run: driver.Run, notes: Notes) -> Result:
    """Round to the dtype of W, measure what is returned, and keep the start if rounding made it best."""
    weight, units = objective.weight, objective.units
    initial = units.out_of(start).astype(weight.dtype)
    found = units.out_of(canonical(objective.scaling.out_of(run.factors))).astype(weight.dtype)
    found, loss, initial_loss, why = better(objective, initial, found)
    if why:
        notes += (f"in {weight.dtype} the initialization {why} and is returned",)
    core = Core.from_dense(found.core, problem.pattern)
    parts = BlockDiagonal(found.left), core, BlockDiagonal(found.right)
    return objective.result(parts, loss, initial_loss, run.history, run.status.noting(*notes))
