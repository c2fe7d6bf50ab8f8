"""Seeded, derandomized property tests; problems are drawn in NumPy and converted per backend."""

from __future__ import annotations

import numpy as np
from hypothesis import HealthCheck, settings

from armorfact.gram import DiagonalGram, FullGram
from armorfact.pattern import Pattern
from armorfact.problem import Factors, Problem

settings.register_profile(
    "theorems",
    derandomize=True,
    deadline=None,
    max_examples=25,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture],
)
settings.load_profile("theorems")


def gram_matrix(rng: np.random.Generator, size: int, kind: str) -> np.ndarray:
    """A Gram matrix: well-conditioned, rank-deficient, with outlier channels (1e10), or dead ones."""
    tokens = size // 2 if kind == "deficient" else 2 * size
    inputs = rng.standard_normal((size, tokens))
    if kind == "outliers":
        inputs *= np.logspace(-2.5, 2.5, size)[rng.permutation(size), None]
    if kind == "dead":
        inputs[rng.permutation(size)[: size // 4]] = 0
    return inputs @ inputs.T


KINDS = ("plain", "deficient", "outliers", "dead")


def random_problem(
    seed: int, kind: str = "plain", diagonal: bool = False, pattern: str = "2:4", dtype: type = np.float64
) -> Problem:
    """A problem with 2 x 3 blocks of random sizes."""
    rng = np.random.default_rng(seed)
    found = Pattern.parse(pattern)
    block_out, block_in = int(rng.integers(1, 6)), found.group * int(rng.integers(1, 4))
    d_out, d_in = 2 * block_out, 3 * block_in
    matrix = gram_matrix(rng, d_in, kind).astype(dtype)
    gram = DiagonalGram(matrix.diagonal().copy()) if diagonal else FullGram(matrix)
    weight = rng.standard_normal((d_out, d_in)).astype(dtype)
    return Problem(weight, gram, found, block_out, block_in)


def random_factors(problem: Problem, seed: int) -> Factors:
    """Random wrappers near the identity around a random core of the pattern."""
    rng = np.random.default_rng(seed)
    core = rng.standard_normal(problem.weight.shape)
    core = np.where(problem.pattern.top_mask(np.abs(core)), core, 0).astype(problem.weight.dtype)
    start = problem.identity_wrapped(core)
    left = start.left + 0.3 * rng.standard_normal(start.left.shape)
    right = start.right + 0.3 * rng.standard_normal(start.right.shape)
    return Factors(left.astype(core.dtype), core, right.astype(core.dtype))
