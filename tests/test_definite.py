"""What keeps the exact solver sound: a definite H, damping that sees no scale, and the schedule of extrapolation."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from armorfact import Pattern, blocks, factorize
from armorfact.definite import definite, without_faint_channels
from armorfact.gram import DiagonalGram, FullGram
from armorfact.problem import Factors
from armorfact.solvers.exact import Exact
from armorfact.solvers.protocol import Best
from armorfact.steps import damping
from armorfact.steps.left import left_step
from armorfact.steps.right import right_step
from tests.conftest import random_factors, random_problem

seeds = st.integers(0, 10**6)


def scaled(matrix: np.ndarray) -> np.ndarray:
    diagonal = matrix.diagonal()
    return matrix / np.sqrt(diagonal[:, None] * diagonal)


def is_definite(matrix: np.ndarray) -> bool:
    try:
        np.linalg.cholesky(matrix)
    except np.linalg.LinAlgError:
        return False
    return True


@given(seeds, st.sampled_from([np.float32, np.float64]), st.integers(-30, 30))
def test_a_definite_matrix_is_left_as_it_is(seed, dtype, scale):
    inputs = np.random.default_rng(seed).standard_normal((24, 96)) * np.logspace(0, -3, 24)[:, None]
    matrix = (inputs @ inputs.T * 2.0**scale).astype(dtype)
    gram = FullGram(matrix)
    assert definite(gram, matrix) is gram
    diagonal = DiagonalGram(matrix.diagonal())
    assert definite(diagonal, matrix.diagonal()) is diagonal


@given(seeds, st.integers(1, 20), st.sampled_from([np.float32, np.float64]))
def test_the_floor_is_the_first_of_its_doublings_that_is_definite(seed, rank, dtype):
    """With a margin m for the rounding of the factorization itself, floors are 2m, 4m, ..."""
    inputs = np.random.default_rng(seed).standard_normal((24, rank))
    matrix = (inputs @ inputs.T).astype(dtype)
    found = definite(FullGram(matrix), matrix).matrix
    added = np.float64(found.diagonal()) / matrix.diagonal() - 1
    margin = float(4 * np.finfo(dtype).eps * 24**0.5)
    doublings = round(np.log2(added.mean() / margin))
    assert doublings >= 1
    np.testing.assert_allclose(added, 2**doublings * margin, atol=2 * np.finfo(dtype).eps)
    np.testing.assert_array_equal(found - np.diag(found.diagonal()), matrix - np.diag(matrix.diagonal()))
    unit = scaled(matrix)
    for count in range(1, doublings + 1):
        tried = unit.copy()
        np.fill_diagonal(tried, 1 + 2**count * margin - margin)
        assert is_definite(tried) is (count == doublings)


@given(seeds, st.integers(0, 99))
def test_a_damped_step_is_the_same_in_every_gauge_and_for_channels_of_every_scale(seed, start):
    """Damping is by the system's own diagonal: here by so much that a step by another one would go elsewhere."""
    problem = random_problem(seed)
    factors = random_factors(problem, start)
    rng = np.random.default_rng(start)
    outer, inner = (2.0 ** rng.integers(-6, 7, size) for size in problem.weight.shape)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(damping, "DAMPING", 0.3)
        expected, residual_gram = left_step(problem, factors)
        gauged = Factors(
            factors.left * blocks.split_rows(outer[:, None], problem.block_out).swapaxes(1, 2),
            factors.core / outer[:, None] / inner,
            factors.right * blocks.split_rows(inner[:, None], problem.block_in),
        )
        found, gauged_gram = left_step(problem, gauged)
        close = {"rtol": 1e-8, "atol": 1e-8 * np.abs(expected.dense()).max()}
        np.testing.assert_allclose(found.dense(), expected.dense(), **close)
        moved, _ = right_step(problem, found, gauged_gram)
        np.testing.assert_allclose(moved.dense(), right_step(problem, expected, residual_gram)[0].dense(), **close)


@given(seeds)
def test_the_extrapolation_grows_where_the_loss_falls_and_halves_where_it_does_not(seed):
    problem = random_problem(seed)
    solver = Exact()
    state = solver.init(problem, random_factors(problem, 0), 0)
    best, beta = Best(state.factors, state.loss), state.beta
    assert beta == 0.5
    for number in range(12):
        lowest = -np.inf if number % 4 == 3 else best.loss  # now and then, as if the best were out of reach
        before = state
        state = solver.step(problem, state, Best(best.factors, lowest))
        accepted = state.loss < lowest
        beta = min(1.0, 1.05 * beta) if accepted else beta / 2
        assert state.beta == pytest.approx(beta, rel=1e-12)
        if not accepted:
            assert state.start is best.factors and before is not state
        elif state.loss < best.loss:
            best = Best(state.factors, state.loss)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("share", [1e-4, 1e-6, 1e-9, 1e-14])
def test_a_channel_of_hardly_any_energy_costs_nothing(share, dtype):
    """Its column alone would become whatever helps the others, and no sweep be accepted."""
    rng = np.random.default_rng(0)
    weight, inputs = rng.standard_normal((32, 32)).astype(dtype), rng.standard_normal((32, 400))
    inputs[5] *= share**0.5
    inputs[9] *= 1000  # an outlier moves no median
    result = factorize(weight, (inputs @ inputs.T).astype(dtype), block=8, max_sweeps=10)
    assert len(result.history) == 11 and result.loss < 0.2 * result.initial_loss
    assert np.abs(result.dense()).max() < 100 * np.abs(weight).max()


def test_channels_that_add_hardly_anything_are_lifted_and_no_others():
    energy = np.array([4.0, 0.0, 1e-20, 2.0, 1.0, 1e-12, 1e-12])
    matrix = np.diag(energy) + 1e-14 * np.outer(energy, energy)
    weight = np.ones((3, 7))
    weight[:, 5] = 1e6  # as one that is measured in another unit
    weight[:, 6] = 0
    found = without_faint_channels(FullGram(matrix), weight).matrix
    np.testing.assert_allclose(found.diagonal(), [4.0, 0.0, 1e-7, 2.0, 1.0, 1e-12, 1e-7], rtol=1e-6)
    np.testing.assert_array_equal(found - np.diag(found.diagonal()), matrix - np.diag(matrix.diagonal()))
    for gram in (FullGram(np.eye(7)), FullGram(np.zeros((7, 7))), DiagonalGram(energy)):
        assert without_faint_channels(gram, weight) is gram


@pytest.mark.parametrize("exponent", [-20, -8, 8, 20])
def test_the_unit_of_a_channel_does_not_matter(exponent):
    rng = np.random.default_rng(0)
    weight, inputs, scale = rng.standard_normal((32, 32)), rng.standard_normal((32, 400)), np.ones(32)
    scale[[3, 11]] = 2.0**exponent
    mask = Pattern(2, 4).top_mask(np.abs(weight))
    losses = [
        factorize(w, x @ x.T, block=8, max_sweeps=5, init=mask).loss
        for w, x in ((weight, inputs), (weight / scale, inputs * scale[:, None]))
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
