"""The paper's discrete step: one group of every block, chosen at random, replaced by its optimum."""

from __future__ import annotations

from typing import Any

import numpy as np

from armorfact import arrays
from armorfact.problem import Factors, Problem
from armorfact.steps.core import core_step

Array = Any


def one_group_step(problem: Problem, factors: Factors, rng: np.random.Generator) -> tuple[Factors, float]:
    """Replace one group of every (block_out, block_in) block; returns the factors and their loss.

    With a diagonal H the blocks do not interact; with a full one they are taken in turn.
    """
    residual = problem.weight - factors.dense()
    residual_gram = problem.gram.multiply(residual)
    loss = arrays.total(residual * residual_gram)
    factors, fallen = core_step(problem, factors, residual_gram, random_groups(problem, rng))
    return factors, problem.resolved(loss - fallen, factors)


def random_groups(problem: Problem, rng: np.random.Generator) -> Array:
    """A (d_out, d_in / group) mask with one True in every block."""
    d_out, d_in = problem.weight.shape
    columns = problem.block_in // problem.pattern.group
    down, across = d_out // problem.block_out, d_in // problem.block_in
    row = rng.integers(problem.block_out, size=(down, across))
    group = rng.integers(columns, size=(down, across))
    mask = np.zeros((d_out, d_in // problem.pattern.group), dtype=bool)
    i, j = np.indices((down, across))
    mask[i * problem.block_out + row, j * columns + group] = True
    xp = arrays.namespace(problem.weight)
    return xp.asarray(mask, device=arrays.device(problem.weight))
