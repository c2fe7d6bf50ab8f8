"""The theorem of `quantize_core`: never above plain rounding, on the same supports; what is returned is measured."""

from __future__ import annotations

from dataclasses import replace

import array_api_strict
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from armorfact import BlockDiagonal, Core, Ending, Pattern, blocks, factorize, quantize_core
from armorfact.solvers.wrappers import Wrappers
from armorfact.steps.rounding import equilibrated, error_costs
from tests.conftest import KINDS, gram_matrix, random_factors, random_problem

pytestmark = pytest.mark.filterwarnings("ignore::armorfact.DampingWarning")


def as64(array) -> np.ndarray:
    return np.asarray(torch.as_tensor(array).double())


def dense64(left, core: Core, right) -> np.ndarray:
    whole = np.asarray(core.dense() if isinstance(core.values, np.ndarray) else core.dense().double(), np.float64)
    return blocks.left_product(as64(left.blocks), blocks.right_product(whole, as64(right.blocks)))


def true_loss(weight, approximation, gram) -> float:
    residual = as64(weight) - approximation
    return float(np.sum((residual @ as64(gram)) * residual))


def stated_loss(weight, approximation, gram, options) -> float:
    """The loss in the objective that the options state, from W and its approximation alone."""
    weight, scale = as64(weight), np.ones(())
    if "row_weight" in options:
        scale = 1 / np.sqrt(as64(options["row_weight"]))[:, None]
    if options.get("normalize"):
        column = np.linalg.norm(weight, axis=0)
        scale = column * np.linalg.norm(weight / column, axis=1)[:, None]
    matrix = as64(gram) if gram.ndim == 2 else np.diag(as64(gram))
    return true_loss((weight - approximation) / scale, 0, matrix)


def plainly_rounded(result) -> np.ndarray:
    """A Q B with one scale a row, as anybody would round C: in float64, A scaled and rounded to its dtype."""
    values, left = as64(result.core.values), as64(result.left.blocks)
    largest = np.abs(values).max(axis=1)
    scale = np.where(largest > 0, largest, 1) / 127
    packed = as64(result.core.packed).astype(np.uint8)
    whole = Core(np.rint(values / scale[:, None]), packed, result.core.pattern, result.core.columns)
    scaled = left * scale.reshape(left.shape[0], 1, -1)
    return dense64(BlockDiagonal(scaled), whole, result.right)


@given(
    seed=st.integers(0, 10**6),
    kind=st.sampled_from(KINDS),
    pattern=st.sampled_from(["2:4", "1:4", "3:4"]),
    dtype=st.sampled_from([np.float16, np.float32, np.float64, torch.bfloat16]),
    options=st.sampled_from([{}, {"normalize": "nowag"}, {"row_weight": True}, {"diagonal": True}]),
    scale=st.integers(-8, 8),
)
def test_never_above_plain_rounding_on_the_same_supports(seed, kind, pattern, dtype, options, scale):
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((16, 24)) * 2.0**scale
    gram = gram_matrix(rng, 24, kind)
    options = dict(options)
    if options.pop("diagonal", False):
        gram = gram.diagonal().copy()
    if options.pop("row_weight", False):
        options["row_weight"] = np.exp(rng.standard_normal(16))
    if dtype is torch.bfloat16:
        weight, gram = torch.tensor(weight).bfloat16(), torch.tensor(gram)
        options = {key: torch.tensor(x) if isinstance(x, np.ndarray) else x for key, x in options.items()}
    else:
        weight = weight.astype(dtype)
    result = factorize(weight, gram, block=8, pattern=pattern, max_sweeps=4, **options)
    rounded = quantize_core(result, weight, gram, **options)
    assert 0 <= rounded.loss <= rounded.initial_loss
    assert str(rounded.core.values.dtype).endswith("int8")
    assert np.abs(as64(rounded.core.values)).max() <= 127
    np.testing.assert_array_equal(as64(rounded.core.packed), as64(result.core.packed))
    assert rounded.left.blocks.dtype == rounded.right.blocks.dtype == weight.dtype
    energy = stated_loss(weight, 0, gram, options)
    found = stated_loss(weight, dense64(rounded.left, rounded.core, rounded.right), gram, options)
    assert rounded.loss == pytest.approx(max(found, 0), rel=1e-5, abs=1e-12 * energy)
    if dtype in (np.float32, np.float64):  # in 16 bits the rounding of A moves the plain loss as well
        assert found <= stated_loss(weight, plainly_rounded(result), gram, options) + 1e-6 * energy


def test_solving_for_the_wrappers_wins_back_most_of_what_rounding_costs():
    rng = np.random.default_rng(0)
    weight, gram = rng.standard_normal((64, 64)), gram_matrix(rng, 64, "plain")
    result = factorize(weight, gram, block=16)
    rounded = quantize_core(result, weight, gram)
    assert rounded.loss - result.loss < 0.2 * (rounded.initial_loss - result.loss)
    assert [sweep.loss for sweep in rounded.history] == sorted((x.loss for x in rounded.history), reverse=True)


def test_an_importance_of_outputs_in_blocks():
    rng = np.random.default_rng(1)
    weight, gram, roots = rng.standard_normal((16, 24)), gram_matrix(rng, 24, "plain"), rng.standard_normal((2, 8, 8))
    importance = roots @ np.swapaxes(roots, 1, 2) + np.eye(8)
    given = factorize(weight, gram, block=8, output_gram=importance)
    rounded = quantize_core(given, weight, gram, output_gram=importance)
    residual = (weight - dense64(rounded.left, rounded.core, rounded.right)).reshape(2, 8, 24)
    assert rounded.loss == pytest.approx(float(np.sum(importance @ residual @ gram * residual)), rel=1e-6)
    assert rounded.loss < rounded.initial_loss


@pytest.mark.parametrize(
    ("options", "ending"),
    [
        ({"max_sweeps": 1, "rtol": 0}, Ending.SWEEP_LIMIT),
        ({"rtol": 0.9}, Ending.CONVERGED),
        ({"time_limit": 0}, Ending.TIME_LIMIT),
        ({"callback": lambda progress: True}, Ending.CALLBACK),
    ],
)
def test_budgets_and_a_callback_stop_the_run(options, ending):
    rng = np.random.default_rng(0)
    weight, gram = rng.standard_normal((32, 32)), gram_matrix(rng, 32, "plain")
    assert quantize_core(factorize(weight, gram, block=8), weight, gram, **options).status.ending is ending


def test_the_aim_may_be_the_product_itself():
    rng = np.random.default_rng(1)
    weight, gram = rng.standard_normal((32, 48)).astype(np.float32), gram_matrix(rng, 48, "plain")
    result = factorize(weight, gram, block=16)
    again = quantize_core((result.left, result.core, result.right), result.dense(), gram)
    assert again.relative_loss < 1e-4
    assert true_loss(result.dense(), again.dense(), gram) == pytest.approx(again.loss, rel=1e-3)


def test_bytes_products_and_warm_starts_of_an_int8_core():
    rng = np.random.default_rng(2)
    weight, gram = rng.standard_normal((16, 32)).astype(np.float32), gram_matrix(rng, 32, "plain")
    result = quantize_core(factorize(weight, gram, block=8), weight, gram)
    assert result.core.values.nbytes == 16 * 16
    assert result.nbytes == 16 * 16 + 16 * 4 + 4 * (2 * 64 + 4 * 64)
    x = rng.standard_normal((5, 32)).astype(np.float32)
    np.testing.assert_allclose(result.apply(x), x @ result.dense().T, rtol=1e-4, atol=1e-4)
    assert result.dense().dtype == np.float32
    assert np.count_nonzero(result.core.mask) == 16 * 16
    warm = factorize(weight, gram, block=8, init=result, max_sweeps=2)
    assert warm.initial_loss == pytest.approx(result.loss, rel=1e-4)
    assert warm.loss < result.loss
    assert quantize_core(result, weight, gram).loss == pytest.approx(result.loss, rel=0.05)


def converted(result, convert):
    """A, C and B of a result in another library's arrays."""
    core = Core(convert(result.core.values), convert(result.core.packed), result.core.pattern, result.core.columns)
    return BlockDiagonal(convert(result.left.blocks)), core, BlockDiagonal(convert(result.right.blocks))


@pytest.mark.parametrize("convert", [torch.tensor, array_api_strict.asarray])
@pytest.mark.parametrize("diagonal", [False, True])
def test_same_factors_as_numpy(convert, diagonal):
    rng = np.random.default_rng(0)
    weight, gram = rng.standard_normal((16, 24)), gram_matrix(rng, 24, "plain")
    gram = gram.diagonal().copy() if diagonal else gram
    given = factorize(weight, gram, block=8, max_sweeps=3)
    expected = quantize_core(given, weight, gram)
    result = quantize_core(converted(given, convert), convert(weight), convert(gram))
    assert type(result.core.values) is type(convert(weight))
    np.testing.assert_array_equal(np.asarray(result.core.values), expected.core.values)
    for side in ("left", "right"):
        found, wanted = getattr(result, side).blocks, getattr(expected, side).blocks
        np.testing.assert_allclose(np.asarray(found), wanted, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("scale", [-100, -30, 30, 100])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_scale(scale, dtype):
    rng = np.random.default_rng(3)
    weight = (torch.tensor(rng.standard_normal((16, 24))) * 2.0**scale).to(dtype)
    gram = torch.tensor(gram_matrix(rng, 24, "plain"))
    given = factorize(weight, gram, block=8, max_sweeps=3)
    result = quantize_core(given, weight, gram)
    assert result.loss <= min(result.initial_loss, 1.1 * given.loss)
    assert all(bool(x.isfinite().all()) for x in (result.left.blocks, result.right.blocks))


@given(st.integers(0, 10**6), st.booleans(), st.sampled_from(KINDS))
def test_equal_costs_and_full_ranges(seed, diagonal, kind):
    """T and S as `error_costs` has them, and scales that no entry leaves and most rows and columns reach."""
    problem = random_problem(seed, kind, diagonal)
    factors = random_factors(problem, seed)
    rows, columns = error_costs(problem, factors)
    left, right = blocks.dense(factors.left), blocks.dense(factors.right)
    gram = np.diag(problem.gram.diagonal) if diagonal else problem.gram.matrix
    np.testing.assert_allclose(rows**2, np.diag(left.T @ left), rtol=1e-9)
    energy = np.clip(np.diag(right @ gram @ right.T), 0, None)
    np.testing.assert_allclose(columns[energy > 0] ** 2, energy[energy > 0], rtol=1e-6, atol=1e-9 * energy.max())
    magnitude = rows[:, None] * np.abs(factors.core) * columns
    scales = equilibrated(magnitude)
    scaled = magnitude / scales[0][:, None] / scales[1]
    assert scaled.max() <= 1 + 1e-9
    held = scaled.max(axis=0)[magnitude.max(axis=0) > 0]
    np.testing.assert_allclose(held, 1, rtol=1e-9)


def test_the_wrappers_alone_move():
    problem = random_problem(5)
    factors = random_factors(problem, 5)
    solver = Wrappers()
    state = solver.init(problem, factors, 0)
    after = solver.step(problem, state, state)
    assert after.loss <= state.loss
    np.testing.assert_array_equal(after.factors.core, factors.core)


def test_what_is_no_factorization_of_this_weight_is_refused_with_a_sentence():
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((16, 24))
    result = factorize(weight, None, block=8, max_sweeps=1)
    with pytest.raises(TypeError, match=r"Result or \(left, core, right\)"):
        quantize_core(weight, weight)
    with pytest.raises(ValueError, match=r"the factorization has shape \(16, 24\), W has \(24, 16\)"):
        quantize_core(result, weight.T.copy())
    with pytest.raises(ValueError, match="wrappers are for a core of shape"):
        quantize_core((result.right, result.core, result.right), weight)
    with pytest.raises(TypeError, match="convert one of them"):
        quantize_core(result, torch.tensor(weight))
    broken = BlockDiagonal(np.full_like(result.left.blocks, np.nan))
    with pytest.raises(ValueError, match="factorization's left has 128 NaN"):
        quantize_core((broken, result.core, result.right), weight)
    with pytest.raises(ValueError, match="must not be negative"):
        quantize_core(result, weight, max_sweeps=-1)


def test_a_value_that_rounds_to_nothing_keeps_its_place():
    matrix = np.zeros((4, 8))
    matrix[:, 0], matrix[:, 3], matrix[:, 5] = 1.0, 1e-6, 0.5
    core = Core.from_dense(matrix, Pattern(2, 4))
    eye = np.tile(np.eye(4)[None], (1, 1, 1)), np.tile(np.eye(4)[None], (2, 1, 1))
    result = quantize_core((BlockDiagonal(eye[0]), core, BlockDiagonal(eye[1])), matrix, None)
    np.testing.assert_array_equal(result.core.packed, core.packed)
    assert result.relative_loss < 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_core_of_more_bits_than_the_wrappers_is_not_rounded_to_theirs(dtype):
    rng = np.random.default_rng(0)
    weight, gram = torch.tensor(rng.standard_normal((16, 24))).float(), torch.tensor(gram_matrix(rng, 24, "plain"))
    result = factorize(weight, gram, block=8, max_sweeps=4)
    core = replace(result.core, values=result.core.values * 2.0**-30)  # float16 has no such numbers
    left = BlockDiagonal((result.left.blocks * 2.0**15).to(dtype))
    right = BlockDiagonal((result.right.blocks * 2.0**15).to(torch.float32).to(dtype))
    small = quantize_core((left, core, right), weight, gram)
    assert small.loss < 1.5 * result.loss + 1e-3 * result.weight_loss
