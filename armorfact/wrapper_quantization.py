"""`quantize_wrappers`: A and B in int8 as well, around a core of whole numbers that is solved for on its own grid."""

from __future__ import annotations

from typing import Any

from armorfact import arrays, blocks, validate
from armorfact.objective import Objective
from armorfact.packed import Core
from armorfact.problem import Factors
from armorfact.quantization import Triple
from armorfact.result import Result
from armorfact.statement import Statement
from armorfact.status import Ending, Status
from armorfact.steps.feedback import round_columns, round_plainly, round_rows
from armorfact.steps.integer import integer_core_step
from armorfact.steps.left import LeftProducts, left_step

Array = Any


def quantize_wrappers(
    factorization: Result | Triple,
    W: Array,
    XXt: Array | None = None,
    *,
    normalize: str | None = None,
    row_weight: Array | None = None,
    output_gram: Array | None = None,
) -> Result:
    r"""Round A and B to int8 and minimize :math:`\operatorname{tr}((W - ACB)\,H\,(W - ACB)^\top)` over what stays free.

    B is rounded first, and C, whose entries stay whole numbers, makes up for that (`armorfact.steps.integer`); then A
    takes its exact step and is rounded (`armorfact.steps.feedback`), and C makes up for that. Every row and column of a
    block has a scale. The loss returned is never above that of plain rounding, one scale a row of each block.

    Args:
        factorization: what `quantize_core` returned, or (A, C, B) with a C in int8.
        W, XXt, normalize, row_weight, output_gram: as of `quantize_core`.

    Returns:
        A `Result` whose A, C and B hold int8 values from -127 to 127; scales of A and B are in the dtype that these
        had, and the supports of C are those given. Its ``initial_loss`` is that of plain rounding.

    Raises:
        TypeError, ValueError: see `quantize_core`; a core that is not in int8.

    Examples:
        >>> import numpy as np
        >>> from armorfact import factorize, quantize_core
        >>> rng = np.random.default_rng(0)
        >>> weight, inputs = rng.standard_normal((32, 64)), rng.standard_normal((64, 256))
        >>> result = quantize_core(factorize(weight, inputs @ inputs.T, block=8), weight, inputs @ inputs.T)
        >>> rounded = quantize_wrappers(result, weight, inputs @ inputs.T)
        >>> rounded.left.blocks.dtype, rounded.left.rows.shape, result.nbytes, rounded.nbytes
        (dtype('int8'), (4, 8), 7424, 3584)
        >>> rounded.loss <= rounded.initial_loss and rounded.loss < 1.02 * result.loss
        True
    """
    left, core, right = validate.factorization(factorization)
    weight = validate.weight(W, core.pattern)
    validate.fits((left, core, right), weight)
    validate.integer_core(core)
    sizes = left.blocks.shape[-1], right.blocks.shape[-1]
    with arrays.plain_arithmetic(weight):
        stated = Statement.of(
            weight, XXt, core.pattern, sizes, normalize=normalize, row_weight=row_weight, output_gram=output_gram
        )
        objective, dtype = stated.objective, left.blocks.dtype
        plain = round_plainly(left.blocks, dtype), core, round_plainly(right.blocks, dtype)
        solved = _solved(stated, core, left.blocks, right.blocks)
        losses = [_loss(objective, found) for found in (plain, solved)]
        best = int(losses[1] < losses[0])
        told = ("A and B rounded to nearest", "A and B rounded in turn, C after each")[best]
        return objective.result((plain, solved)[best], losses[best], losses[0], (), Status(Ending.ROUNDED, told))


def _solved(stated: Statement, layout: Core, left: Array, right: Array) -> Triple:
    """A, C and B in int8; the factors go back and forth between how they are stored and how the problem sees them."""
    problem, objective, dtype = stated.problem, stated.objective, left.dtype
    working, kept = validate.working_dtype(objective.weight), layout.mask
    stored = Factors(left, layout.dense(working), right).astype(working)
    seen = _seen(objective, stored)
    outer = blocks.split_columns(blocks.left_product(seen.left, seen.core), problem.block_in)
    whole_right = round_columns(stored.right, arrays.transpose(outer) @ outer, dtype)
    seen = _seen(objective, stored.replace(right=whole_right.scaled(working)))
    seen, _ = left_step(problem, integer_core_step(problem, seen, kept))
    stored = _stored(objective, seen)
    whole_left = round_rows(stored.left, LeftProducts(problem, seen).gram, dtype)
    seen = _seen(objective, stored.replace(left=whole_left.scaled(working), right=whole_right.scaled(working)))
    return whole_left, _packed(integer_core_step(problem, seen, kept).core, layout), whole_right


def _packed(whole: Array, layout: Core) -> Core:
    """Whole numbers on the supports of a core."""
    xp = arrays.namespace(whole)
    values = xp.take_along_axis(whole, layout.places, axis=1)
    return Core(xp.astype(values, xp.int8), layout.packed, layout.pattern, layout.columns)


def _seen(objective: Objective, stored: Factors) -> Factors:
    """Factors as the problem sees them: units and scaling go into A and B, and C stays."""
    left = arrays.times_two_to(stored.left, -objective.units.weight)
    return objective.scaling.into_wrappers(stored.replace(left=left))


def _stored(objective: Objective, seen: Factors) -> Factors:
    """The inverse."""
    found = objective.scaling.out_of(seen)
    return found.replace(left=arrays.times_two_to(found.left, objective.units.weight))


def _loss(objective: Objective, parts: Triple) -> float:
    left, core, right = parts
    dtype = arrays.namespace(core.values).float64
    return objective.loss(Factors(left.scaled(dtype), core.dense(dtype), right.scaled(dtype)))
