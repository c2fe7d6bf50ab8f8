"""Theorems about single block steps, against naive twins and brute force."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from armorfact import blocks
from armorfact.arrays import batched, kernels
from armorfact.blocks import diagonal_blocks
from armorfact.problem import Factors
from armorfact.solvers.adam import gradients
from armorfact.solvers.gradient import core_gradient_step, left_gradient_step, right_gradient_step
from armorfact.steps import core as core_module
from armorfact.steps import damping
from armorfact.steps.core import best_group, core_step, core_step_naive, support_inverses
from armorfact.steps.left import LeftProducts, left_step, left_step_naive
from armorfact.steps.right import right_step, right_step_naive
from armorfact.steps.smoothness import core_smoothness, left_smoothness, right_smoothness
from tests.conftest import KINDS, random_factors, random_problem

problems = st.builds(
    random_problem,
    seed=st.integers(0, 10**6),
    kind=st.sampled_from(KINDS),
    diagonal=st.booleans(),
    pattern=st.sampled_from(["2:4", "1:4", "3:4", "1:2", "2:8"]),
)
plain_problems = st.builds(random_problem, seed=st.integers(0, 10**6), diagonal=st.booleans())


@pytest.fixture(autouse=True)
def _small_panels(monkeypatch):
    monkeypatch.setattr(core_module, "PANEL", 8)


@pytest.fixture
def hardly_damped(monkeypatch):
    """The twins solve least-squares problems without damping."""
    monkeypatch.setattr(damping, "DAMPING", 1e-13)


def not_above(new: float, old: float, problem) -> bool:
    return new <= old + 1e-10 * problem.weight_energy


@given(problems, st.integers(0, 99))
def test_no_exact_step_raises_the_loss_and_the_residual_gram_stays_true(problem, seed):
    factors = random_factors(problem, seed)
    before = problem.loss(factors)
    after_left, residual_gram = left_step(problem, factors)
    assert not_above(problem.loss(after_left), before, problem)
    after_right, residual_gram = right_step(problem, after_left, residual_gram)
    assert not_above(problem.loss(after_right), problem.loss(after_left), problem)
    scale = np.abs(problem.weight_gram).max() * 1e-8
    np.testing.assert_allclose(residual_gram, problem.residual_gram(after_right), atol=scale, rtol=1e-6)
    after_core, fallen = core_step(problem, after_right, residual_gram)
    assert fallen >= 0
    assert not_above(problem.loss(after_core), problem.loss(after_right), problem)
    expected = problem.loss(after_right) - problem.loss(after_core)
    assert fallen == pytest.approx(expected, abs=1e-8 * problem.weight_energy)
    assert problem.pattern.most_kept(after_core.core) <= problem.pattern.keep


@given(plain_problems, st.integers(0, 99))
def test_steps_agree_with_their_naive_twins(hardly_damped, problem, seed):
    factors = random_factors(problem, seed)
    energy = problem.weight_energy
    left, residual_gram = left_step(problem, factors)
    assert problem.loss(left) == pytest.approx(problem.loss(left_step_naive(problem, factors)), abs=1e-6 * energy)
    right, residual_gram = right_step(problem, left, residual_gram)
    assert problem.loss(right) == pytest.approx(problem.loss(right_step_naive(problem, left)), abs=1e-5 * energy)
    core, _ = core_step(problem, right, residual_gram)
    assert problem.loss(core) == pytest.approx(problem.loss(core_step_naive(problem, right)), abs=1e-7 * energy)


@given(plain_problems, st.integers(0, 99))
def test_left_and_right_steps_satisfy_their_normal_equations(hardly_damped, problem, seed):
    """Repeating a step reaches a point where the gradient in that factor vanishes."""
    factors = random_factors(problem, seed)
    for _ in range(30):
        factors, _ = left_step(problem, factors)
    before = gradients(problem, random_factors(problem, seed))
    assert np.abs(gradients(problem, factors)[0]).max() <= 1e-6 * np.abs(before[0]).max()
    for _ in range(400):
        factors, _ = right_step(problem, factors, problem.residual_gram(factors))
    assert np.abs(gradients(problem, factors)[2]).max() <= 1e-2 * np.abs(before[2]).max()


@given(st.integers(0, 10**6), st.sampled_from(["2:4", "1:4", "3:4", "4:8", "1:2"]), st.booleans())
def test_the_group_step_is_the_global_optimum_over_supports_and_values(seed, pattern, diagonal):
    problem = random_problem(seed, diagonal=diagonal, pattern=pattern)
    factors = random_factors(problem, seed + 1)
    rng = np.random.default_rng(seed)
    group = problem.pattern.group
    r, g = int(rng.integers(problem.weight.shape[0])), int(rng.integers(problem.weight.shape[1] // group))
    visit = np.zeros((problem.weight.shape[0], problem.weight.shape[1] // group), dtype=bool)
    visit[r, g] = True
    stepped, _ = core_step(problem, factors, problem.residual_gram(factors), visit)
    columns = slice(g * group, (g + 1) * group)
    root = np.linalg.cholesky(np.atleast_2d(problem.gram.multiply(np.eye(problem.weight.shape[1]))))
    emptied = factors.core.copy()
    emptied[r, columns] = 0
    target = (problem.weight - factors.replace(core=emptied).dense()) @ root
    left, right = blocks.dense(factors.left), blocks.dense(factors.right)
    best = best_group(target, left[:, r], right[columns] @ root, problem.pattern)
    emptied[r, columns] = best
    assert problem.loss(stepped) == pytest.approx(problem.loss(factors.replace(core=emptied)), rel=1e-9)
    changed = stepped.core != factors.core
    changed[r, columns] = False
    assert not changed.any()


@given(problems, st.integers(0, 99))
def test_one_over_beta_steps_obey_the_descent_lemma(problem, seed):
    """L(x - g / beta) <= L(x) - ||g||^2 / (2 beta): for C, all blocks of A, and each of B in turn."""
    factors = random_factors(problem, seed)
    gradient = gradients(problem, factors)[1]
    beta = core_smoothness(problem, factors)
    stepped = core_gradient_step(problem, factors, problem.residual_gram(factors))
    bound = problem.loss(factors) - (np.sum(gradient**2) / (2 * beta) if beta else 0)
    assert not_above(problem.loss(stepped), bound, problem)
    left, residual_gram = left_gradient_step(problem, factors)
    inner_gram = LeftProducts(problem, factors).gram
    gained = lowered(gradients(problem, factors)[0], left_smoothness(inner_gram))
    assert not_above(problem.loss(left), problem.loss(factors) - gained, problem)
    right, _ = right_gradient_step(problem, left, residual_gram)
    before = left
    for j in range(len(left.right)):
        after = before.replace(right=np.concatenate([right.right[: j + 1], left.right[j + 1 :]]))
        beta = right_smoothness(*right_grams(problem, left, j))
        gained = lowered(gradients(problem, before)[2][j][None], beta[None])
        assert not_above(problem.loss(after), problem.loss(before) - gained, problem)
        before = after


def lowered(gradient, beta):
    """||g||^2 / (2 beta) of each block, together."""
    squares = np.sum(gradient**2, axis=(-2, -1))
    return float(np.sum(squares[beta > 0] / (2 * beta[beta > 0])))


def right_grams(problem, factors, j):
    """G_j' G_j with G_j = A C_j, and H_jj."""
    columns = slice(j * problem.block_in, (j + 1) * problem.block_in)
    outer = (blocks.dense(factors.left) @ factors.core)[:, columns]
    whole = problem.gram.multiply(np.eye(problem.weight.shape[1]))
    return outer.T @ outer, whole[columns, columns]


@given(plain_problems, st.integers(0, 99))
def test_the_smoothness_constant_bounds_the_curvature(problem, seed):
    factors = random_factors(problem, seed)
    direction = np.random.default_rng(seed).standard_normal(factors.core.shape)
    zero = factors.replace(core=np.zeros_like(direction))
    along = Factors(factors.left, direction, factors.right).dense()
    curvature = 2 * problem.gram.inner(along)
    assert curvature <= core_smoothness(problem, zero) * np.sum(direction**2) * (1 + 1e-9)
    left = np.random.default_rng(seed).standard_normal(factors.left.shape)
    curvature = 2 * problem.gram.inner(Factors(left, factors.core, factors.right).dense())
    bound = np.sum(left_smoothness(LeftProducts(problem, factors).gram) * np.sum(left**2, axis=(-2, -1)))
    assert curvature <= bound * (1 + 1e-9)
    j, right = seed % len(factors.right), np.zeros_like(factors.right)
    right[j] = np.random.default_rng(seed).standard_normal(right[j].shape)
    curvature = 2 * problem.gram.inner(Factors(factors.left, factors.core, right).dense())
    assert curvature <= right_smoothness(*right_grams(problem, factors, j)) * np.sum(right**2) * (1 + 1e-9)


@given(plain_problems, st.integers(0, 99))
def test_gradients_agree_with_finite_differences(problem, seed):
    factors = random_factors(problem, seed)
    left, core, right = gradients(problem, factors)
    rng = np.random.default_rng(seed)
    step = 1e-6
    directions = [rng.standard_normal(x.shape) for x in (left, core, right)]
    directions[1] *= factors.core != 0
    expected = sum(np.sum(g * d) for g, d in zip((left, core, right), directions, strict=True))
    moved = [
        Factors(
            factors.left + sign * step * directions[0],
            factors.core + sign * step * directions[1],
            factors.right + sign * step * directions[2],
        )
        for sign in (1, -1)
    ]
    measured = (problem.loss(moved[0]) - problem.loss(moved[1])) / (2 * step)
    assert measured == pytest.approx(expected, rel=1e-4, abs=1e-5 * problem.weight_energy)


@given(problems, st.integers(0, 99))
def test_the_batched_sweep_is_the_compiled_one(problem, seed):
    factors = random_factors(problem, seed)
    rows, columns, group = problem.block_out, problem.block_in, problem.pattern.group
    rng = np.random.default_rng(seed)
    grams = np.stack([m @ m.T for m in rng.standard_normal((3, columns, columns))])
    inverses = np.stack([support_inverses(diagonal_blocks(m, problem.pattern.group), problem.pattern) for m in grams])
    gradient = np.ascontiguousarray(blocks.split_grid(rng.standard_normal(factors.core.shape), rows, columns))
    core = np.ascontiguousarray(blocks.split_grid(factors.core, rows, columns))
    visit = rng.random((2, 3, rows, columns // group)) < 0.8
    left_gram = np.swapaxes(factors.left, 1, 2) @ factors.left
    supports = np.asarray(problem.pattern.supports)
    outcomes = []
    for sweep in (kernels.sweep_blocks, batched.sweep_blocks):
        q, c = gradient.copy(), core.copy()
        outcomes.append((sweep(q, c, visit, left_gram, grams, inverses, supports), q, c))
    for fast, slow in zip(*outcomes, strict=True):
        np.testing.assert_allclose(fast, slow, rtol=1e-6, atol=1e-7)


@given(problems, st.integers(0, 10**6), st.sampled_from([2, 3, 5, 7]))
def test_any_number_of_threads_gives_the_same_bits(problem, seed, threads):
    factors, rng = random_factors(problem, seed), np.random.default_rng(seed)
    rows, columns, group = problem.block_out, problem.block_in, problem.pattern.group
    grams = np.stack([m @ m.T for m in rng.standard_normal((3, columns, columns))])
    inverses = np.stack([support_inverses(diagonal_blocks(m, group), problem.pattern) for m in grams])
    slopes = rng.standard_normal((2, 3, rows, columns))
    core = np.ascontiguousarray(blocks.split_grid(factors.core, rows, columns))
    visit, supports = np.ones((2, 3, rows, columns // group), bool), np.asarray(problem.pattern.supports)
    left = np.stack([m @ m.T for m in rng.standard_normal((5, rows, rows))])
    whole = np.rint(20 * rng.standard_normal((5, rows, columns)))

    def swept(number):
        first, second = (slopes.copy(), core.copy()), (np.resize(slopes, whole.shape), whole.copy())
        with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(number) as pool:
            patch.setattr(kernels, "WORTH_A_THREAD", 0)
            patch.setattr(kernels, "_threads", lambda: number)
            patch.setattr(kernels, "_pool", lambda: pool)
            fallen = kernels.sweep_blocks(*first, visit, left[:2], grams, inverses, supports)
            kernels.sweep_integers(*second, whole != 0, left, grams[0], 127)
        return fallen, *first, *second

    for alone, shared in zip(swept(1), swept(threads), strict=True):
        np.testing.assert_array_equal(shared, alone)
