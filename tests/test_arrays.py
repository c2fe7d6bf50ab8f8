"""What the array layer does in panels or in place, against the plain operation."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from armorfact import arrays, blocks


@pytest.mark.parametrize("size", [1, 5, arrays.PANEL, 2 * arrays.PANEL + 3])
@pytest.mark.parametrize("convert", [np.asarray, torch.tensor])
def test_a_matrix_is_flipped_panel_by_panel(size, convert):
    matrix = np.random.default_rng(0).standard_normal((size, size)).astype(np.float32)
    found = arrays.flipped(convert(matrix), arrays.namespace(convert(matrix)).float64)
    np.testing.assert_array_equal(np.asarray(found), matrix[::-1, ::-1].astype(np.float64))
    assert str(found.dtype).endswith("float64")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_one_number_that_is_none_is_found_in_any_panel(bad):
    matrix = np.ones((arrays.PANEL + 2, 3))
    assert arrays.all_finite(matrix)
    matrix[-1, 1] = bad
    assert not arrays.all_finite(matrix)


def test_the_factor_takes_the_place_of_a_torch_matrix_with_the_same_bits():
    root = torch.randn(40, 60, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gram = (root @ root.T).tril()
    gram += gram.tril(-1).T  # the same in both triangles
    expected = arrays.cholesky(gram)
    place = gram.clone().T
    found = arrays.cholesky(place, overwrite=True)
    assert torch.equal(found, expected) and found.data_ptr() == place.data_ptr()
    assert torch.equal(arrays.cholesky(gram.clone(), overwrite=True), expected)  # stored by rows
    gram[7, 7] = -1.0
    assert arrays.cholesky(gram.T, overwrite=True) is None


def test_blocks_on_the_diagonals_of_a_batch():
    batch = np.arange(2 * 6 * 6).reshape(2, 6, 6)
    expected = np.stack([blocks.diagonal_blocks(matrix, 3) for matrix in batch])
    np.testing.assert_array_equal(blocks.diagonal_blocks(batch, 3), expected)
    np.testing.assert_array_equal(expected[1, 1], batch[1, 3:, 3:])
