"""The one-shot methods, against textbook implementations."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from armorfact import DampingWarning, Pattern, magnitude, nowag, sparsegpt, wanda
from armorfact.gram import FullGram
from armorfact.initial import METHODS
from armorfact.initial.sparsegpt import damped_factor
from tests.conftest import gram_matrix


def sparsegpt_textbook(weight: np.ndarray, gram: np.ndarray, pattern: Pattern, damping: float) -> np.ndarray:
    """The published sweep: Cholesky factor of the inverse, every later column updated at once."""
    weight = weight.copy()
    damped = gram + damping * np.mean(np.diag(gram)) * np.eye(len(gram))
    upper = np.linalg.cholesky(np.linalg.inv(damped)).T
    for j in range(len(gram)):
        if j % pattern.group == 0:
            columns = slice(j, j + pattern.group)
            mask = pattern.top_mask((weight[:, columns] / np.diag(upper)[columns]) ** 2)
        kept = np.where(mask[:, j % pattern.group], weight[:, j], 0)
        error = (weight[:, j] - kept) / upper[j, j]
        weight[:, j:] -= error[:, None] * upper[j, j:]
        weight[:, j] = kept
    return weight


@given(
    st.integers(0, 10**6), st.sampled_from(["plain", "deficient", "outliers"]), st.sampled_from(["2:4", "4:8", "1:2"])
)
def test_sparsegpt_is_the_published_sweep(seed, kind, pattern):
    rng = np.random.default_rng(seed)
    found = Pattern.parse(pattern)
    weight, gram = rng.standard_normal((6, 136)), gram_matrix(rng, 136, kind)
    expected = sparsegpt_textbook(weight, gram, found, 0.01)
    np.testing.assert_allclose(sparsegpt(weight, gram, pattern=pattern), expected, rtol=1e-6, atol=1e-8)


def test_sparsegpt_records_that_it_needed_more_damping():
    gram = np.eye(8)
    gram[0, 1] = gram[1, 0] = 1 + 1e-3
    with pytest.warns(DampingWarning, match="doubled"):
        damped_factor(FullGram(gram), 1e-6)


def test_sparsegpt_survives_a_gram_matrix_of_zeros():
    weight = np.arange(16.0).reshape(2, 8)
    np.testing.assert_allclose(sparsegpt(weight, np.zeros((8, 8))), magnitude(weight), rtol=1e-9)


@given(st.integers(0, 10**6))
def test_magnitude_and_wanda_minimize_their_objectives(seed):
    rng = np.random.default_rng(seed)
    weight, energy = rng.standard_normal((3, 8)), rng.random(8) + 0.1
    for pruned, scale in ((magnitude(weight), np.ones(8)), (wanda(weight, energy), energy)):
        for row in range(3):
            for group in (slice(0, 4), slice(4, 8)):
                cost = (weight[row, group] ** 2) * scale[group]
                best = min(cost.sum() - cost[list(kept)].sum() for kept in itertools.combinations(range(4), 2))
                assert np.sum((weight - pruned)[row, group] ** 2 * scale[group]) == pytest.approx(best)


def test_nowag_ignores_the_scale_of_a_column_of_the_weight():
    rng = np.random.default_rng(0)
    weight, energy = rng.standard_normal((8, 16)), rng.random(16)
    scale = np.exp(rng.standard_normal(16))
    np.testing.assert_array_equal(nowag(weight, energy) != 0, nowag(weight * scale, energy) != 0)
    assert (wanda(weight, energy) != 0).tolist() != (wanda(weight * scale, energy) != 0).tolist()


def test_nowag_keeps_the_largest_normalized_weights_times_the_norms_of_their_inputs():
    rng = np.random.default_rng(0)
    weight, energy = rng.standard_normal((8, 16)), rng.random(16)
    scaled = weight / np.linalg.norm(weight, axis=0)
    scaled /= np.linalg.norm(scaled, axis=1, keepdims=True)
    kept = Pattern(2, 4).top_mask(scaled**2 * energy)
    np.testing.assert_array_equal(nowag(weight, energy), np.where(kept, weight, 0))
    assert not np.array_equal(kept, Pattern(2, 4).top_mask(scaled**2))


@pytest.mark.parametrize("damping", [0.001, 0.5])
def test_sparsegpt_is_damped_by_that_share_of_the_mean_diagonal(damping):
    rng = np.random.default_rng(0)
    weight, gram = rng.standard_normal((6, 24)), gram_matrix(rng, 24, "outliers")
    found = sparsegpt(weight, gram, damping=damping)
    np.testing.assert_allclose(found, sparsegpt_textbook(weight, gram, Pattern(2, 4), damping), rtol=1e-6, atol=1e-8)
    assert not np.allclose(found, sparsegpt_textbook(weight, gram, Pattern(2, 4), 0.01))


@given(st.integers(0, 10**6), st.sampled_from([0.0, 0.01, 0.5]))
def test_sparsegpt_of_a_diagonal_is_that_of_the_diagonal_matrix(seed, damping):
    rng = np.random.default_rng(seed)
    weight, energy = rng.standard_normal((6, 24)), rng.random(24) + 0.01
    found = sparsegpt(weight, energy, damping=damping)
    np.testing.assert_allclose(found, sparsegpt_textbook(weight, np.diag(energy), Pattern(2, 4), damping), rtol=1e-9)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_dtype_comes_back(dtype):
    weight = np.random.default_rng(0).standard_normal((4, 8)).astype(dtype)
    for pruned in (magnitude(weight), wanda(weight, None), nowag(weight, None), sparsegpt(weight, None)):
        assert pruned.dtype == dtype
        assert Pattern(2, 4).most_kept(pruned) == 2


def test_the_methods_are_one_table_with_one_signature():
    weight, gram = np.random.default_rng(0).standard_normal((4, 8)), np.eye(8)
    methods = (sparsegpt, wanda, nowag, magnitude)
    assert list(METHODS) == [method.__name__ for method in methods]
    for method in methods:
        table = METHODS[method.__name__](weight, FullGram(gram), Pattern(1, 4))
        assert np.array_equal(table, method(weight, gram, pattern="1:4"))
        assert Pattern(1, 4).most_kept(method(weight, gram, pattern="1:4")) == 1


@pytest.mark.parametrize("damping", [-1.0, float("nan"), float("inf")])
def test_damping_is_a_finite_number(damping):
    with pytest.raises(ValueError, match="damping must be a finite number >= 0"):
        sparsegpt(np.ones((4, 4)), None, damping=damping)
