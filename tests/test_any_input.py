"""The theorem for every input: any rank, condition, scale and dtype; never above the start, never unbounded."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from armorfact import DampingWarning, Pattern, factorize, magnitude, nowag, sparsegpt, wanda
from armorfact.problem import MOST_GROWTH
from tests.conftest import gram_matrix

pytestmark = pytest.mark.filterwarnings("ignore::armorfact.DampingWarning")

WEIGHT = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)


def true_loss(weight, approximation, gram) -> float:
    """tr(R H R') in float64, from W, H and the factors as they are."""
    residual = np.asarray(weight, dtype=np.float64) - approximation
    return float(np.sum((residual @ np.float64(gram)) * residual))


def dense64(result) -> np.ndarray:
    factors = result.factors
    left, core, right = (np.asarray(torch.as_tensor(x).double()) for x in (factors.left, factors.core, factors.right))
    size = left.shape[-1]
    half = np.concatenate([a @ core[i * size : (i + 1) * size] for i, a in enumerate(left)])
    size = right.shape[-1]
    return np.concatenate([half[:, j * size : (j + 1) * size] @ b for j, b in enumerate(right)], axis=1)


def holds(weight, gram, result) -> None:
    """The theorem, measured independently; SparseGPT itself is the start."""
    start = sparsegpt(weight, gram)
    as64 = np.asarray(torch.as_tensor(weight).double())
    pruned, found = np.asarray(torch.as_tensor(start).double()), dense64(result)
    assert np.isfinite(found).all()
    assert np.abs(found).max() <= 1.01 * MOST_GROWTH * np.abs(as64).max()
    gram = np.asarray(torch.as_tensor(gram).double())
    energy = true_loss(as64, 0, gram)
    assert true_loss(as64, found, gram) <= true_loss(as64, pruned, gram) + 1e-15 * energy
    assert 0 <= result.loss <= result.initial_loss
    assert result.loss == pytest.approx(max(true_loss(as64, found, gram), 0), rel=1e-6, abs=1e-12 * energy)
    assert result.initial_loss == pytest.approx(true_loss(as64, pruned, gram), rel=1e-6)


def low_rank(rank: int, seed: int, size: int = 64) -> np.ndarray:
    inputs = np.random.default_rng(seed).standard_normal((size, rank)).astype(np.float32)
    return inputs @ inputs.T


def conditioned(condition: float, seed: int, outliers: bool, size: int = 64) -> np.ndarray:
    """Eigenvalues, or channel energies, spread evenly over ``condition``."""
    rng = np.random.default_rng(seed)
    spread = np.logspace(0, -np.log10(condition), size)
    if outliers:
        inputs = rng.standard_normal((size, 2 * size)) * np.sqrt(spread)[rng.permutation(size), None]
        return inputs @ inputs.T
    basis = np.linalg.qr(rng.standard_normal((size, size)))[0]
    gram = (basis * spread) @ basis.T
    return (gram + gram.T) / 2


def test_an_outer_product_is_solved_without_negative_losses_or_huge_entries():
    vector = np.random.default_rng(9).standard_normal(64).astype(np.float32)
    gram = np.outer(vector, vector)
    result = factorize(WEIGHT, gram, block=16)
    holds(WEIGHT, gram, result)
    assert result.relative_loss < 1e-5
    assert np.abs(result.dense()).max() < 100 * np.abs(WEIGHT).max()


@pytest.mark.parametrize("rank", [1, 2, 3, 4, 8, 16, 32, 48, 63, 64])
def test_every_rank(rank):
    for seed in range(4):
        gram = low_rank(rank, seed)
        holds(WEIGHT, gram, factorize(WEIGHT, gram, block=16, max_sweeps=12))


@pytest.mark.parametrize("condition", [1e2, 1e6, 1e10, 1e14])
@pytest.mark.parametrize("outliers", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_every_condition(condition, outliers, dtype):
    for seed in range(2):
        gram = conditioned(condition, seed, outliers).astype(dtype)
        weight = WEIGHT.astype(dtype)
        holds(weight, gram, factorize(weight, gram, block=16, max_sweeps=12))


@given(
    seed=st.integers(0, 10**6),
    rank=st.integers(1, 24),
    dtype=st.sampled_from([np.float16, np.float32, np.float64, torch.bfloat16]),
    scale=st.integers(-100, 100),
    loudness=st.integers(-100, 100),
    solver=st.sampled_from(["exact", "gradient", "adam"]),
)
def test_every_dtype_and_scale(seed, rank, dtype, scale, loudness, solver):
    """W * 2**scale and H * 2**loudness, 1e-30 to 1e30, wherever the dtype can hold them."""
    rng = np.random.default_rng(seed)
    small = dtype is np.float16
    weight = rng.standard_normal((16, 24)) * 2.0 ** (scale % 16 - 8 if small else scale)
    inputs = rng.standard_normal((24, rank)).astype(np.float64 if dtype is np.float64 else np.float32)
    gram = (inputs @ inputs.T).astype(np.float64) * 2.0**loudness
    if dtype is torch.bfloat16:
        weight, gram = torch.tensor(weight).bfloat16(), torch.tensor(gram)
    else:
        weight = weight.astype(dtype)
    holds(weight, gram, factorize(weight, gram, block=8, max_sweeps=5, solver=solver))


SCALES = [(-83, 0), (63, 0), (0, -199), (0, 199), (100, 100), (-100, 100), (-100, -100)]


@pytest.mark.parametrize(("scale", "loudness"), SCALES)
@pytest.mark.parametrize("options", [{}, {"normalize": "nowag"}, {"solver": "adam"}, {"solver": "gradient"}])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_powers_of_two_change_no_bit(scale, loudness, options, dtype):
    weight, gram = WEIGHT[:16, :24].astype(dtype), gram_matrix(np.random.default_rng(1), 24, "plain")
    base = factorize(weight, gram, block=8, max_sweeps=4, **options)
    scaled = factorize(weight * dtype(2.0**scale), gram * 4.0 ** (loudness // 2), block=8, max_sweeps=4, **options)
    np.testing.assert_array_equal(scaled.left.blocks, base.left.blocks)
    np.testing.assert_array_equal(scaled.right.blocks, base.right.blocks)
    np.testing.assert_array_equal(scaled.core.packed, base.core.packed)
    np.testing.assert_array_equal(scaled.core.values, base.core.values * dtype(2.0**scale))
    assert scaled.relative_loss == base.relative_loss
    assert scaled.status == base.status


@pytest.mark.parametrize(
    ("weight", "gram", "options"),
    [
        (1e-25, 1, {}),
        (1, 1e-60, {}),
        (1e25, 1, {"normalize": "nowag"}),
        (1e19, 1, {}),
        (1, 1e60, {}),
        (1e30, 1e30, {}),
        (1e-30, 1e-30, {}),
    ],
)
def test_other_scales_give_the_answer_of_scale_one(weight, gram, options):
    matrix = gram_matrix(np.random.default_rng(1), 64, "plain")
    base = factorize(WEIGHT, matrix, block=16, max_sweeps=6, **options)
    result = factorize(WEIGHT * np.float32(weight), matrix * gram, block=16, max_sweeps=6, **options)
    assert result.relative_loss == pytest.approx(base.relative_loss, rel=1e-2)
    difference = np.float64(result.dense()) / weight - base.dense()
    assert np.linalg.norm(difference) <= 1e-2 * np.linalg.norm(base.dense())
    assert result.status == base.status


@pytest.mark.parametrize("method", [sparsegpt, wanda, nowag, magnitude])
@pytest.mark.parametrize(("scale", "loudness"), SCALES)
def test_one_shot_methods_of_another_scale(method, scale, loudness):
    gram = gram_matrix(np.random.default_rng(1), 64, "plain")
    scaled = method(WEIGHT * np.float32(2.0**scale), gram * 4.0 ** (loudness // 2))
    np.testing.assert_array_equal(scaled, method(WEIGHT, gram) * np.float32(2.0**scale))


def test_row_weights_of_any_scale():
    gram = gram_matrix(np.random.default_rng(1), 64, "plain")
    importance = np.linspace(0.5, 4, 64)
    base = factorize(WEIGHT, gram, block=16, max_sweeps=4, row_weight=importance)
    scaled = factorize(WEIGHT, gram, block=16, max_sweeps=4, row_weight=importance * 2.0**-200)
    np.testing.assert_array_equal(scaled.dense(), base.dense())
    assert scaled.loss == base.loss * 2.0**-200


@pytest.mark.parametrize(("given", "quiet"), [(np.float16, 1e-4), (np.float32, 1e-25), (np.float64, 1e-25)])
def test_a_channel_whose_energy_rounds_to_nothing_is_taken_for_silent(given, quiet):
    inputs = np.random.default_rng(3).standard_normal((64, 256)) / 16
    inputs[5] *= quiet
    gram = (inputs @ inputs.T).astype(given)
    rounded = gram.astype(np.float32)
    assert rounded[5, 5] == 0 and np.abs(rounded[5]).max() > 0
    weight = WEIGHT.astype(np.float32)
    result = factorize(weight, gram, block=16, max_sweeps=4)
    assert result.factors.finite() and result.loss < result.initial_loss
    for places in ([(5, 6)], [(6, 5)], [(5, 6), (6, 5)]):
        wrong = gram.copy()
        for place in places:
            wrong[place] = 0.1
        with pytest.raises(ValueError, match="zero energy"):
            factorize(weight, wrong, block=16)


def test_norms_do_not_leave_the_range_that_their_squares_leave():
    weight = WEIGHT.astype(np.float32)
    weight[:, 3] *= 1e-25
    found, wanted = (
        factorize(each, block=16, normalize="nowag", max_sweeps=2) for each in (weight, np.float64(weight))
    )
    assert found.weight_loss == pytest.approx(wanted.weight_loss, rel=1e-5)


def test_row_weights_forty_orders_of_magnitude_apart():
    gram = gram_matrix(np.random.default_rng(1), 64, "plain")
    result = factorize(WEIGHT, gram, block=16, max_sweeps=4, row_weight=np.logspace(-20, 20, 64))
    assert result.factors.finite() and result.loss < 1e-3 * result.initial_loss


def test_float16_at_its_limit_stays_finite_and_says_so():
    gram = gram_matrix(np.random.default_rng(1), 64, "plain").astype(np.float32)
    weight = (np.sign(WEIGHT) * 65504).astype(np.float16)
    result = factorize(weight, gram, block=16)
    assert all(np.isfinite(x).all() for x in (result.left.blocks, result.core.values, result.right.blocks))
    assert "start from Wanda's" in result.status and "stays in range" in result.status
    assert result.loss <= result.initial_loss
    assert result.weight_loss == pytest.approx(true_loss(weight, 0, gram), rel=1e-9)
    pruned = sparsegpt(weight, gram)
    assert np.isfinite(pruned).all() and Pattern(2, 4).most_kept(pruned) <= 2
    half = factorize(weight / 64, gram, block=16)
    assert half.loss < half.initial_loss and "initialization" not in half.status


def test_a_rank_deficient_gram_matrix_of_float16():
    gram = low_rank(8, 3).astype(np.float16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DampingWarning)
        result = factorize(WEIGHT, gram, block=16)
    assert 0 <= result.loss <= result.initial_loss
    assert np.abs(result.dense()).max() <= MOST_GROWTH * np.abs(WEIGHT).max()


def test_entries_out_of_proportion_are_not_accepted():
    class Outsized:
        max_sweeps, rtol, patience = 3, 0.0, 5

        def init(self, problem, factors, seed):
            return _Claim(factors, problem.loss(factors))

        def step(self, problem, state, best):
            return _Claim(best.factors.replace(core=2000 * best.factors.core), best.loss / 2)

    class _Claim:
        def __init__(self, factors, loss):
            self.factors, self.loss = factors, loss

    result = factorize(WEIGHT, low_rank(4, 0), block=16, solver=Outsized())
    assert len(result.history) == 1
    assert "3 sweeps ended with entries above 1000 times" in result.status
