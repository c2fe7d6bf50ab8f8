"""`factorize`: the front door. It checks, scales, initializes, runs a solver, and measures."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from armorfact import arrays, driver, validate
from armorfact.driver import Budget, Progress
from armorfact.gauge import canonical
from armorfact.gram import FullGram, Gram
from armorfact.initial import METHODS
from armorfact.initial.sparsegpt import prune, within_range
from armorfact.objective import Objective, Units
from armorfact.packed import Core, array_bytes
from armorfact.pattern import Pattern
from armorfact.problem import Factors, Problem
from armorfact.result import BlockDiagonal, Result
from armorfact.scaling import Scaling
from armorfact.solvers import Adam, Exact, Gradient, Solver

Array = Any

SOLVERS = {"exact": Exact, "gradient": Gradient, "adam": Adam}
INITIALIZATIONS = tuple(METHODS)


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
        max_sweeps, rtol: the solver's own defaults if None.
        time_limit: seconds after which no further sweep starts.
        callback: called with a `Progress` after every sweep; a true return value stops the run.
        seed: of the solvers that draw at random.

    Returns:
        A `Result` whose arrays have the library, dtype and device of W.

    Raises:
        TypeError: arguments of the wrong type, integer or complex dtypes, two array libraries.
        ValueError: wrong shapes, sizes that blocks or groups do not divide, NaN or infinite
            entries, an XXt that is not symmetric positive semidefinite, negative budgets, unknown names.
    """
    pattern = Pattern.parse(pattern)
    weight = validate.weight(W, pattern)
    block_out, block_in = validate.blocks(block, weight.shape, pattern)
    algorithm = _solver(solver)
    budget = _budget(algorithm, max_sweeps, rtol, time_limit)
    seed = validate.seed(seed)
    _check_init(init, weight, pattern, (block_out, block_in))
    _check_name("normalize", normalize, (None, "nowag"))
    scaled, weight_unit = validate.scaled(weight)
    gram, gram_unit = validate.gram(XXt, weight)
    row_weight, row_unit = validate.row_weights(row_weight, weight)

    scaling = Scaling.of(scaled, normalize, row_weight)
    units = Units(weight_unit, gram_unit, row_unit, normalize is not None)
    objective = Objective(weight, validate.as_given(XXt, gram), scaling, units)
    problem = Problem(scaling.scaled(scaled), validate.definite(gram, XXt), pattern, block_out, block_in)
    start, notes = _start(init, scaled, gram, problem, objective)
    run = driver.run(algorithm, problem, scaling.into(start), budget, seed, callback, units.loss)
    return _measured(objective, problem, start, run, notes)


def _check_name(argument: str, value: Any, known: tuple[Any, ...]) -> None:
    if value not in known:
        raise ValueError(f"{argument} must be one of {known}, got {value!r}")


def _solver(solver: str | Solver) -> Solver:
    if isinstance(solver, str):
        _check_name("solver", solver, tuple(SOLVERS))
        return SOLVERS[solver]()
    missing = [name for name in ("init", "step", "max_sweeps", "rtol", "patience") if not hasattr(solver, name)]
    if missing or isinstance(solver, type):
        raise TypeError(
            f"solver must be one of {tuple(SOLVERS)} or an object of the solver protocol; "
            f"{solver!r} lacks {missing or 'an instance: call the class'}"
        )
    return solver


def _budget(solver: Solver, max_sweeps: int | None, rtol: float | None, time_limit: float | None) -> Budget:
    return Budget(
        max_sweeps=solver.max_sweeps if max_sweeps is None else max_sweeps,
        rtol=solver.rtol if rtol is None else rtol,
        patience=solver.patience,
        time_limit=time_limit,
    )


def _check_init(init: Any, weight: Array, pattern: Pattern, block: tuple[int, int]) -> None:
    if isinstance(init, str):
        _check_name("init", init, INITIALIZATIONS)
        return
    if isinstance(init, Result):
        found = (init.core.shape, init.core.pattern, init.left.blocks.shape[-1], init.right.blocks.shape[-1])
        if found != (tuple(weight.shape), pattern, *block):
            raise ValueError(
                f"a warm start needs the same shape, pattern and blocks: expected "
                f"{tuple(weight.shape)}, {pattern}, {block}, got {found[0]}, {found[1]}, {found[2:]}"
            )
        _same_library(init.core.values, weight, "the warm start")
        return
    if not arrays.is_array(init):
        raise TypeError(f"init must be one of {INITIALIZATIONS}, a boolean mask or a Result, got {type(init).__name__}")
    _check_mask(init, weight, pattern)


def _check_mask(mask: Array, weight: Array, pattern: Pattern) -> None:
    _same_library(mask, weight, "the mask")
    if mask.dtype != arrays.namespace(mask).bool:
        raise TypeError(f"a mask must be boolean, got dtype {mask.dtype}; compare with `!= 0`")
    if tuple(mask.shape) != tuple(weight.shape):
        raise ValueError(f"the mask must have the shape of W, {tuple(weight.shape)}, got {tuple(mask.shape)}")
    if pattern.most_kept(mask) > pattern.keep:
        raise ValueError(
            f"the mask keeps {pattern.most_kept(mask)} of a group of {pattern.group}; "
            f"pattern {pattern} allows {pattern.keep}"
        )


def _same_library(array: Array, weight: Array, name: str) -> None:
    if arrays.library(array) != arrays.library(weight):
        raise TypeError(
            f"W is a {arrays.library(weight)} array and {name} a {arrays.library(array)} one; convert one of them"
        )


def _start(init: Any, weight: Array, gram: Gram, problem: Problem, objective: Objective) -> tuple[Factors, str]:
    """The starting factors of the scaled W, and what the status has to say about them."""
    if isinstance(init, Result):
        return objective.units.into(init.factors.astype(weight.dtype)), ""
    if not isinstance(init, str):
        xp = arrays.namespace(weight)
        return problem.identity_wrapped(xp.where(init, weight, xp.zeros_like(weight))), ""
    if init != "sparsegpt":
        array = gram.matrix if isinstance(gram, FullGram) else gram.diagonal
        return problem.identity_wrapped(METHODS[init](weight, array, pattern=problem.pattern)), ""
    home = objective.units.weight, objective.weight.dtype
    core, rows = within_range(prune(weight, gram, problem.pattern), weight, gram, problem.pattern, home)
    note = f"; {rows} rows that SparseGPT takes out of the range of {home[1]} start from Wanda's choice"
    return problem.identity_wrapped(core), note if rows else ""


def _measured(objective: Objective, problem: Problem, start: Factors, run: driver.Run, notes: str) -> Result:
    """Round to the dtype of W, measure what is returned, and keep the start if rounding made it best."""
    weight, units = objective.weight, objective.units
    initial = units.out_of(start).astype(weight.dtype)
    found = units.out_of(canonical(objective.scaling.out_of(run.factors))).astype(weight.dtype)
    initial_loss = objective.loss(initial)
    usable = objective.usable(found)
    loss = objective.loss(found) if usable else math.inf
    if not loss <= initial_loss:
        why = "has the smaller loss" if usable else "alone stays in range"
        found, loss = initial, initial_loss
        notes += f"; in {weight.dtype} the initialization {why} and is returned"
    return Result(
        left=BlockDiagonal(found.left),
        core=Core.from_dense(found.core, problem.pattern),
        right=BlockDiagonal(found.right),
        loss=units.loss(max(loss, 0.0)),
        initial_loss=units.loss(max(initial_loss, 0.0)),
        weight_loss=units.loss(max(objective.weight_loss(problem.block_out), 0.0)),
        history=run.history,
        status=run.status + notes,
        original_nbytes=array_bytes(weight),
    )
