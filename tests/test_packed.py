"""Patterns and the packed core."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from armorfact import BlockDiagonal, Core, Pattern, arrays
from armorfact.packed import pack_positions, unpack_positions

PATTERNS = ["1:2", "1:4", "2:4", "3:4", "2:8", "4:8"]


@given(st.sampled_from(PATTERNS), st.integers(0, 10**6), st.floats(0, 1))
def test_packing_round_trips_also_with_zeros_among_the_kept(text, seed, zeros):
    pattern = Pattern.parse(text)
    rng = np.random.default_rng(seed)
    matrix = rng.standard_normal((5, 3 * pattern.group))
    matrix = np.where(pattern.top_mask(np.abs(matrix)) & (rng.random(matrix.shape) > zeros), matrix, 0)
    core = Core.from_dense(matrix, pattern)
    np.testing.assert_array_equal(core.dense(), matrix)
    assert core.values.shape == (5, 3 * pattern.keep)
    positions = core.positions.reshape(5, 3, pattern.keep).astype(int)
    assert (np.diff(positions, axis=-1) > 0).all()
    assert core.packed.shape[1] == math.ceil(3 * pattern.keep * pattern.index_bits / 8)
    assert core.mask.sum() == core.values.size
    x = rng.standard_normal((2, matrix.shape[1]))
    np.testing.assert_allclose(core.apply(x, rows_at_once=2), x @ matrix.T, atol=1e-12)


def test_rows_are_packed_panel_by_panel():
    rng = np.random.default_rng(0)
    matrix = rng.standard_normal((arrays.PANEL + 3, 8)) * Pattern(2, 4).top_mask(rng.random((arrays.PANEL + 3, 8)))
    whole, last = Core.from_dense(matrix, Pattern(2, 4)), Core.from_dense(matrix[-5:], Pattern(2, 4))
    np.testing.assert_array_equal(whole.dense(), matrix)
    np.testing.assert_array_equal(whole.packed[-5:], last.packed)


def test_two_four_takes_two_bits_a_position_the_first_in_the_low_bits():
    packed = pack_positions(np.array([[0, 3, 1, 2, 2]]), 2)
    np.testing.assert_array_equal(packed, [[0 + 3 * 4 + 1 * 16 + 2 * 64, 2]])
    np.testing.assert_array_equal(unpack_positions(packed, 2, 5), [[0, 3, 1, 2, 2]])


def test_too_many_non_zeros_are_refused():
    with pytest.raises(ValueError, match="holds 3 non-zeros"):
        Core.from_dense(np.array([[1.0, 1, 1, 0]]), Pattern(2, 4))


@pytest.mark.parametrize("text", PATTERNS)
def test_supports_are_all_choices(text):
    pattern = Pattern.parse(f" {text} ")
    assert len(set(pattern.supports)) == math.comb(pattern.group, pattern.keep)
    assert str(pattern) == text


@pytest.mark.parametrize("text", ["4:4", "0:4", "5:4", "8:16", "2-4", "two:four"])
def test_patterns_that_make_no_sense_are_refused(text):
    with pytest.raises(ValueError, match="pattern"):
        Pattern.parse(text)


def test_ties_keep_the_left_most():
    np.testing.assert_array_equal(Pattern(2, 4).top_mask(np.ones((1, 4))), [[True, True, False, False]])


@pytest.mark.parametrize("side", ["rows", "columns"])
def test_one_scale_alone_counts(side):
    scale = np.arange(1.0, 5.0).reshape(2, 2)
    plain, scaled = BlockDiagonal(np.ones((2, 2, 2))), BlockDiagonal(np.ones((2, 2, 2), np.int8), **{side: scale})
    factor = np.diag(scale.ravel())
    expected = factor @ plain.dense() if side == "rows" else plain.dense() @ factor
    np.testing.assert_array_equal(scaled.dense(), expected)
    np.testing.assert_array_equal(scaled.apply(np.eye(4)), expected.T)


@pytest.mark.parametrize(
    "matrix", [BlockDiagonal(np.ones((1, 4, 4))), Core.from_dense(np.array([[0.5, 0, 0, 0.25]]), Pattern(2, 4))]
)
def test_a_product_with_what_does_not_fit_is_refused(matrix):
    with pytest.raises(TypeError, match="x must have a real floating dtype, got int64"):
        matrix.apply(np.eye(4, dtype=np.int64))
    with pytest.raises(ValueError, match=r"x must have 4 columns, got shape \(2, 8\)"):
        matrix.apply(np.ones((2, 8)))
