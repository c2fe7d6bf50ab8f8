"""`quantize_wrappers` and its steps: never above plain rounding, on the same supports; fast and naive agree."""

from __future__ import annotations

import array_api_strict
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from armorfact import BlockDiagonal, factorize, quantize_core, quantize_wrappers
from armorfact.problem import Factors
from armorfact.steps import core as core_module
from armorfact.steps.damping import damped
from armorfact.steps.feedback import (
    _errors,
    _with_feedback,
    round_columns,
    round_plainly,
    round_rows,
    with_feedback_naive,
)
from armorfact.steps.integer import integer_core_step, integer_core_step_naive
from tests.conftest import KINDS, gram_matrix, random_factors, random_problem
from tests.test_quantization import as64, converted, dense64, stated_loss

pytestmark = pytest.mark.filterwarnings("ignore::armorfact.DampingWarning")
TYPES = (np.float16, np.float32, np.float64, torch.bfloat16)


def quantized(weight, gram, **options):
    result = factorize(weight, gram, block=8, max_sweeps=4, **options)
    options.pop("pattern", None)
    return quantize_core(result, weight, gram, **options)


def exact(result) -> np.ndarray:
    """A C B in float64, with scales multiplied in there."""
    left, right = (
        BlockDiagonal(as64(side.blocks) * as64(side.rows)[..., None] * as64(side.columns)[:, None, :])
        for side in (result.left, result.right)
    )
    return dense64(left, result.core, right)


@given(
    seed=st.integers(0, 10**6),
    kind=st.sampled_from(KINDS),
    pattern=st.sampled_from(["2:4", "1:4", "3:4"]),
    dtype=st.sampled_from(TYPES),
    options=st.sampled_from([{}, {"normalize": "nowag"}, {"row_weight": True}, {"diagonal": True}]),
    scale=st.integers(-8, 8),
)
def test_never_above_plain_rounding_and_measured_as_it_is_stored(seed, kind, pattern, dtype, options, scale):
    rng = np.random.default_rng(seed)
    weight, gram = rng.standard_normal((16, 24)) * 2.0**scale, gram_matrix(rng, 24, kind)
    options = dict(options)
    gram = gram.diagonal().copy() if options.pop("diagonal", False) else gram
    if options.pop("row_weight", False):
        options["row_weight"] = np.exp(rng.standard_normal(16))
    if dtype is torch.bfloat16:
        weight, gram = torch.tensor(weight).bfloat16(), torch.tensor(gram)
        options = {key: torch.tensor(x) if isinstance(x, np.ndarray) else x for key, x in options.items()}
    else:
        weight = weight.astype(dtype)
    given = quantized(weight, gram, pattern=pattern, **options)
    rounded = quantize_wrappers(given, weight, gram, **options)
    assert 0 <= rounded.loss <= rounded.initial_loss
    np.testing.assert_array_equal(as64(rounded.core.packed), as64(given.core.packed))
    for side in (rounded.left, rounded.right):
        assert str(side.blocks.dtype).endswith("int8")
        assert np.abs(as64(side.blocks)).max() <= 127
        assert side.rows.dtype == side.columns.dtype == side.dtype == weight.dtype
    found, energy = (stated_loss(weight, other, gram, options) for other in (exact(rounded), 0))
    assert rounded.loss == pytest.approx(max(found, 0), rel=1e-5, abs=1e-12 * energy)


def test_more_than_half_of_what_plain_rounding_costs_is_won_back():
    rng = np.random.default_rng(0)
    weight, gram = rng.standard_normal((64, 64)), gram_matrix(rng, 64, "plain")
    given = quantize_core(factorize(weight, gram, block=16), weight, gram)
    rounded = quantize_wrappers(given, weight, gram)
    assert rounded.loss - given.loss < 0.4 * (rounded.initial_loss - given.loss)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("shape", "alive"), [((128, 64), 64), ((64, 128), 50)])
def test_blocks_with_more_rows_than_there_are_inputs(shape, alive, dtype):
    """D = Z H Z' has no full rank then, and its two halves are rounded differently."""
    rng = np.random.default_rng(0)
    weight = torch.from_numpy(rng.standard_normal(shape)).to(dtype)
    inputs = rng.standard_normal((shape[1], 300)) * (np.arange(shape[1]) < alive)[:, None]
    gram = torch.from_numpy(inputs @ inputs.T).float()
    result = quantize_core(factorize(weight, gram, block=64, max_sweeps=2), weight, gram)
    rounded = quantize_wrappers(result, weight, gram)
    assert rounded.loss < rounded.initial_loss


def test_an_importance_of_outputs_in_blocks():
    rng = np.random.default_rng(1)
    weight, gram, roots = rng.standard_normal((16, 24)), gram_matrix(rng, 24, "plain"), rng.standard_normal((2, 8, 8))
    importance = roots @ np.swapaxes(roots, 1, 2) + np.eye(8)
    given = quantized(weight, gram, output_gram=importance)
    rounded = quantize_wrappers(given, weight, gram, output_gram=importance)
    residual = (weight - exact(rounded)).reshape(2, 8, 24)
    assert rounded.loss == pytest.approx(float(np.sum(importance @ residual @ gram * residual)), rel=1e-6)
    assert rounded.loss < rounded.initial_loss


@given(st.integers(0, 10**6), st.booleans(), st.sampled_from(KINDS))
def test_the_core_step_agrees_with_its_twin_and_lowers_the_loss(seed, diagonal, kind):
    problem = random_problem(seed, "plain" if kind == "deficient" else kind, diagonal)
    factors = random_factors(problem, seed)
    kept = factors.core != 0
    factors = factors.replace(core=np.rint(factors.core * 20), left=factors.left / 20)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(core_module, "PANEL", 8)  # several of them, where errors of one move the next
        after, naive = (step(problem, factors, kept) for step in (integer_core_step, integer_core_step_naive))
    np.testing.assert_array_equal(after.core, naive.core)
    assert problem.loss(after) <= problem.loss(factors) * (1 + 1e-12)
    assert not after.core[~kept].any()
    np.testing.assert_array_equal(after.core, np.rint(after.core))


@given(st.integers(0, 10**6), st.integers(2, 7), st.sampled_from(["plain", "deficient"]))
def test_feedback_agrees_with_its_twin_and_no_row_ends_above_rounding_to_nearest(seed, size, kind):
    rng = np.random.default_rng(seed)
    blocks = rng.standard_normal((3, size, size))
    gram = np.stack([gram_matrix(rng, size, kind) for _ in range(3)])
    cost = np.sqrt(np.diagonal(gram, axis1=1, axis2=2))
    gram /= cost[:, :, None] * cost[:, None, :]
    step = 0.3 * np.exp(rng.standard_normal((3, size, size)))
    np.testing.assert_array_equal(_with_feedback(blocks, gram, step), with_feedback_naive(blocks, gram, step))
    found = round_rows(blocks, gram, np.float64)
    metric = damped(gram)
    errors = _errors(blocks - found.scaled(), metric)
    step = found.rows[..., :, None] * found.columns[..., None, :]
    near = np.clip(np.rint(blocks / step), -127, 127) * step
    assert (errors <= _errors(blocks - near, metric) * (1 + 1e-6) + 1e-20).all()  # a row on its grid has none
    turned = round_columns(np.swapaxes(blocks, 1, 2), gram, np.float64)
    np.testing.assert_array_equal(turned.blocks, np.swapaxes(found.blocks, 1, 2))
    np.testing.assert_array_equal(turned.rows, found.columns)


@pytest.mark.parametrize("convert", [torch.tensor, array_api_strict.asarray])
@pytest.mark.parametrize("diagonal", [False, True])
def test_same_factors_as_numpy(convert, diagonal):
    rng = np.random.default_rng(0)
    weight, gram = rng.standard_normal((16, 24)), gram_matrix(rng, 24, "plain")
    gram = gram.diagonal().copy() if diagonal else gram
    given = quantized(weight, gram)
    expected = quantize_wrappers(given, weight, gram)
    result = quantize_wrappers(converted(given, convert), convert(weight), convert(gram))
    assert type(result.left.blocks) is type(convert(weight))
    np.testing.assert_array_equal(np.asarray(result.core.values), expected.core.values)
    for side in ("left", "right"):
        for part in ("blocks", "rows", "columns"):
            found, wanted = (np.asarray(getattr(getattr(x, side), part)) for x in (result, expected))
            np.testing.assert_allclose(found, wanted, rtol=1e-9)


@pytest.mark.parametrize("scale", [-100, -30, 30, 100])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_scale(scale, dtype):
    rng = np.random.default_rng(3)
    weight = (torch.tensor(rng.standard_normal((16, 24))) * 2.0**scale).to(dtype)
    gram = torch.tensor(gram_matrix(rng, 24, "plain"))
    given = quantized(weight, gram)
    result = quantize_wrappers(given, weight, gram)
    assert result.loss <= min(result.initial_loss, 1.1 * given.loss)
    held = (result.left.rows, result.left.columns, result.right.rows, result.right.columns)
    assert all(bool(x.isfinite().all()) for x in held)


def test_zeros_stay_zeros():
    weight = np.zeros((16, 24))
    weight[0, :] = 1e-30
    given = quantize_core(factorize(weight, None, block=8), weight)
    assert np.isfinite(exact(quantize_wrappers(given, weight))).all()
    plain = round_plainly(np.zeros((2, 4, 4)), np.float32)
    assert not plain.blocks.any() and (plain.rows > 0).all()


def test_bytes_products_and_warm_starts():
    rng = np.random.default_rng(2)
    weight, gram = rng.standard_normal((16, 32)).astype(np.float32), gram_matrix(rng, 32, "plain")
    result = quantize_wrappers(quantized(weight, gram), weight, gram)
    assert result.nbytes == 16 * 16 + 16 * 4 + (2 * 64 + 4 * 64) + 4 * 2 * (16 + 32)
    x = rng.standard_normal((5, 32)).astype(np.float32)
    np.testing.assert_allclose(result.apply(x), x @ exact(result).T, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(result.dense(), exact(result), rtol=1e-4, atol=1e-4)
    assert isinstance(result.factors, Factors) and result.factors.left.dtype == np.float32
    warm = factorize(weight, gram, block=8, init=result, max_sweeps=2)
    assert warm.initial_loss == pytest.approx(result.loss, rel=1e-4)
    again = quantize_wrappers(result, weight, gram)
    assert again.loss == pytest.approx(result.loss, rel=0.05)


def test_a_core_that_is_not_in_int8_is_refused_with_the_way_out():
    weight = np.random.default_rng(0).standard_normal((16, 24))
    with pytest.raises(TypeError, match=r"must be in int8, got float64: `quantize_core` rounds it"):
        quantize_wrappers(factorize(weight, None, block=8, max_sweeps=1), weight)
