"""Correlations against what is known of them, and intervals that treat a layer's points as one observation."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.evidence.correlation import (
    bootstrap,
    centered,
    geometric_mean,
    mean_within,
    pearson,
    ranks,
    spearman,
)


@pytest.fixture
def generator():
    return np.random.default_rng(0)


def test_pearson_is_that_of_numpy_and_blind_to_scale_and_shift(generator):
    x = generator.standard_normal(40)
    y = x + generator.standard_normal(40)
    assert pearson(x, y) == pytest.approx(np.corrcoef(x, y)[0, 1])
    assert pearson(3 * x - 7, 0.1 * y + 2) == pytest.approx(pearson(x, y))
    assert pearson(x, -2 * x) == pytest.approx(-1)


def test_a_constant_has_no_correlation():
    assert np.isnan(pearson(np.ones(5), np.arange(5.0)))


def test_equal_values_share_the_mean_of_their_ranks():
    assert ranks(np.array([5.0, 1.0, 5.0, 2.0, 5.0])).tolist() == [4, 1, 4, 2, 4]


def test_spearman_sees_only_the_order(generator):
    x, y = generator.random(30), generator.random(30)
    assert spearman(x, y) == pytest.approx(spearman(np.exp(9 * x), y**3))
    assert spearman(x, np.exp(x)) == pytest.approx(1)
    assert pearson(x, np.exp(9 * x)) < 0.9


def test_spearman_without_ties_is_the_textbook_formula(generator):
    x, y = generator.random(20), generator.random(20)
    difference = ranks(x) - ranks(y)
    assert spearman(x, y) == pytest.approx(1 - 6 * (difference**2).sum() / (20 * (20**2 - 1)))


def test_centring_removes_what_belongs_to_the_group():
    """Two layers of different levels, in each of which x foretells the opposite of y."""
    groups = ["a"] * 3 + ["b"] * 3
    x = np.array([1.0, 2, 3, 11, 12, 13])
    y = np.array([3.0, 2, 1, 13, 12, 11])
    assert pearson(x, y) > 0.9
    assert pearson(centered(x, groups), centered(y, groups)) == pytest.approx(-1)
    assert mean_within(spearman, x, y, groups) == pytest.approx(-1)


def test_groups_without_a_statistic_are_left_out_of_the_mean():
    x, y = np.array([1.0, 1, 1, 2, 3]), np.array([1.0, 2, 1, 2, 3])
    assert mean_within(pearson, x, y, ["a", "a", "b", "b", "b"]) == pytest.approx(1)


def test_the_interval_of_a_mean_is_that_of_its_standard_error(generator):
    values = generator.standard_normal(400)
    found = bootstrap(lambda index, _: values[index].mean(), [str(k) for k in range(400)])
    error = values.std() / 20
    assert found.value == pytest.approx(values.mean())
    assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.1)


def test_points_of_one_group_are_not_counted_as_independent(generator):
    """The same value eight times over says nothing more, though the naive interval would shrink by the root of 8."""
    once = generator.standard_normal(30)
    values, groups = np.repeat(once, 8), np.repeat([str(k) for k in range(30)], 8).tolist()
    single = bootstrap(lambda index, _: once[index].mean(), [str(k) for k in range(30)])
    repeated = bootstrap(lambda index, _: values[index].mean(), groups)
    assert repeated.high - repeated.low == pytest.approx(single.high - single.low, rel=0.1)


def test_the_same_seed_gives_the_same_interval(generator):
    values = generator.random(10)
    groups = [str(k) for k in range(10)]
    draws = [bootstrap(lambda index, _: values[index].mean(), groups, seed=3) for _ in range(2)]
    assert draws[0] == draws[1]


def test_the_geometric_mean_of_a_ratio_and_its_inverse_are_inverse(generator):
    ratios = np.exp(generator.standard_normal(50))
    found, inverse = geometric_mean(ratios), geometric_mean(1 / ratios)
    assert found.value == pytest.approx(1 / inverse.value)
    assert found.low < found.value < found.high


def test_a_layer_drawn_twice_counts_twice():
    seen = []
    bootstrap(lambda index, groups: seen.append((index, groups)) or 0.0, ["a", "a", "b", "c"], draws=20)
    for index, groups in seen:
        assert len(set(groups)) == 3
        for number in range(3):
            assert tuple(index[groups == number]) in {(0, 1), (2,), (3,)}
