"""`factorize`: the front door. It checks, scales, initializes, runs a solver, and measures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from armorfact import arrays, driver, initial, validate
from armorfact.driver import Budget, Progress
from armorfact.gauge import canonical
from armorfact.gram import Gram
from armorfact.initial.nowag import normalize as nowag_normalization
from armorfact.packed import Core, array_bytes
from armorfact.pattern import Pattern
from armorfact.problem import Factors, Problem, residual_panels
from armorfact.result import BlockDiagonal, Result
from armorfact.solvers import Adam, Exact, Gradient, Solver

Array = Any

SOLVERS = {"exact": Exact, "gradient": Gradient, "adam": Adam}
INITIALIZATIONS = ("sparsegpt", "wanda", "nowag", "magnitude")


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
            entries, an XXt that is not symmetric positive semidefinite, unknown names.
    """
    pattern = Pattern.parse(pattern)
    weight = validate.weight(W, pattern)
    block_out, block_in = validate.blocks(block, weight.shape, pattern)
    algorithm = _solver(solver)
    budget = _budget(algorithm, max_sweeps, rtol, time_limit)
    _check_init(init, weight, pattern, (block_out, block_in))
    row_weight = validate.row_weights(row_weight, weight)
    _check_name("normalize", normalize, (None, "nowag"))
    gram = validate.gram(XXt, weight)

    scaling = Scaling.of(validate.working(weight), normalize, row_weight)
    problem = Problem(
        weight=scaling.scaled(validate.working(weight)),
        gram=gram,
        pattern=pattern,
        block_out=block_out,
        block_in=block_in,
    )
    start = _initial_factors(init, weight, gram, problem, scaling)
    run = driver.run(algorithm, problem, scaling.into(start), budget, seed, callback)
    return _measured(weight, problem, scaling, start, run)


@dataclass(frozen=True)
class Scaling:
    """Row and column scales that turn a weighted or normalized objective into the plain one.

    The solver sees W_ij / (row_i column_j); factors go back with A's rows times row and B's
    columns times column.

    Args:
        row: (d_out,) or None for ones; column: (d_in,) or None for ones.
    """

    row: Array | None
    column: Array | None

    @classmethod
    def of(cls, weight: Array, normalize: str | None, row_weight: Array | None) -> Scaling:
        """The scaling of the objective asked for."""
        row = column = None
        if normalize == "nowag":
            found = nowag_normalization(weight)
            row, column = found.row, found.column
        if row_weight is not None:
            row = row_weight**-0.5 if row is None else row * row_weight**-0.5
        return cls(row, column)

    def scaled(self, weight: Array, rows: slice = slice(None)) -> Array:
        """W, or those of its rows, as the solver sees it."""
        if self.column is not None:
            weight = weight / self.column
        return weight if self.row is None else weight / self.row[rows][:, None]

    def into(self, factors: Factors) -> Factors:
        """Factors of W as factors of the scaled W.

        The scales go into A and B; where those are identities, as at the start, into C, so that a
        solver starts at identities too.
        """
        left, core, right = factors.left, factors.core, factors.right
        if self.row is not None:
            left, core = left / self._rows(left), core / self.row[:, None]
            left = left * self._columns(self.row, left)
        if self.column is not None:
            right, core = right / self._columns(self.column, right), core / self.column[None, :]
            right = right * self._rows_of(self.column, right)
        return Factors(left, core, right)

    def out_of(self, factors: Factors) -> Factors:
        """Factors of the scaled W as factors of W."""
        left, right = factors.left, factors.right
        if self.row is not None:
            left = left * self._rows(left)
        if self.column is not None:
            right = right * self._columns(self.column, right)
        return Factors(left, factors.core, right)

    def _rows(self, stack: Array) -> Array:
        return self._rows_of(self.row, stack)

    @staticmethod
    def _rows_of(scale: Array, stack: Array) -> Array:
        return arrays.namespace(stack).reshape(scale, (stack.shape[0], stack.shape[1], 1))

    @staticmethod
    def _columns(scale: Array, stack: Array) -> Array:
        return arrays.namespace(stack).reshape(scale, (stack.shape[0], 1, stack.shape[1]))


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


def _initial_factors(init: Any, weight: Array, gram: Gram, problem: Problem, scaling: Scaling) -> Factors:
    """The starting factors, in the scale of W and in the working dtype."""
    if isinstance(init, Result):
        return init.factors.astype(validate.working_dtype(weight))
    core = _initial_core(init, validate.working(weight), gram, problem.pattern)
    return problem.identity_wrapped(core)


def _initial_core(init: Any, weight: Array, gram: Gram, pattern: Pattern) -> Array:
    xp = arrays.namespace(weight)
    if not isinstance(init, str):
        return xp.where(init, weight, xp.zeros_like(weight))
    if init == "magnitude":
        return initial.magnitude(weight, pattern=pattern)
    methods = {"sparsegpt": initial.sparsegpt, "wanda": initial.wanda, "nowag": initial.nowag}
    return methods[init](weight, getattr(gram, "matrix", gram.diagonal), pattern=pattern)


def _measured(weight: Array, problem: Problem, scaling: Scaling, start: Factors, run: driver.Run) -> Result:
    """Round to the dtype of W, measure what is returned, and keep the start if rounding made it best."""
    measure = partial(_loss, weight, problem, scaling)
    found = canonical(scaling.out_of(run.factors)).astype(weight.dtype)
    rounded_start = start.astype(weight.dtype)
    loss, initial_loss = measure(found), measure(rounded_start)
    status = run.status
    if not loss <= initial_loss:
        found, loss = rounded_start, initial_loss
        status += f"; in {weight.dtype} the initialization has the smaller loss and is returned"
    return Result(
        left=BlockDiagonal(found.left),
        core=Core.from_dense(found.core, problem.pattern),
        right=BlockDiagonal(found.right),
        loss=loss,
        initial_loss=initial_loss,
        weight_loss=measure(rounded_start.replace(core=0 * rounded_start.core)),
        history=run.history,
        status=status,
        original_nbytes=array_bytes(weight),
    )


def _loss(weight: Array, problem: Problem, scaling: Scaling, factors: Factors) -> float:
    """The loss of factors of W, in float64, in the objective asked for."""
    return sum(
        problem.gram.inner(scaling.scaled(residual, rows)) for rows, residual in residual_panels(weight, factors)
    )
