"""A problem as it was asked for and as a solver sees it: checked, scaled, in units that keep products in range."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from armorfact import validate
from armorfact.definite import definite, without_faint_channels
from armorfact.gram import Gram
from armorfact.objective import Objective, Units
from armorfact.pattern import Pattern
from armorfact.problem import Problem
from armorfact.scaling import Scaling

Array = Any


@dataclass(frozen=True)
class Statement:
    """The arguments of the front doors, once they are checked.

    Args:
        weight, gram: W and H in the working dtype, in units of powers of two.
        objective: what losses are reported in. problem: what a solver minimizes.
    """

    weight: Array
    gram: Gram
    objective: Objective
    problem: Problem

    @classmethod
    def of(
        cls,
        weight: Array,
        XXt: Array | None,
        pattern: Pattern,
        blocks: tuple[int, int],
        *,
        normalize: str | None,
        row_weight: Array | None,
        output_gram: Array | None,
    ) -> Statement:
        """The statement for a W that is checked already; the other arguments are those of `factorize`.

        Args:
            blocks: (block_out, block_in).

        Raises:
            TypeError, ValueError: what is wrong with H, the outputs' importance or the normalization.
        """
        validate.one_of("normalize", normalize, (None, "nowag"))
        scaled, weight_unit = validate.scaled(weight)
        gram, gram_unit = validate.gram(XXt, weight)
        outputs, output_unit = validate.output_gram(output_gram, row_weight, weight, blocks[0])
        scaling = Scaling.of(scaled, normalize, outputs)
        units = Units(weight_unit, gram_unit, output_unit, normalize is not None)
        objective = Objective(weight, validate.as_given(XXt, gram), scaling, units)
        solved = scaling.scaled(scaled)
        sound = without_faint_channels(definite(gram, XXt), solved)
        return cls(scaled, gram, objective, Problem(solved, sound, pattern, *blocks))
