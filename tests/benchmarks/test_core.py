"""The dense int4 weights that an int8 core is compared with are what their name says."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.core import BITS, GROUP, bits_of, rounded


@given(st.integers(0, 10**6), st.sampled_from([128, 200, 256, 576]), st.floats(1e-3, 1e3))
def test_sixteen_numbers_a_group_none_further_than_half_a_step(seed, columns, scale):
    weight = torch.randn(5, columns, generator=torch.Generator().manual_seed(seed)) * scale
    found = rounded(weight)
    for before, after in zip(weight.split(GROUP, 1), found.split(GROUP, 1), strict=True):
        spans = before.amax(1) - before.amin(1)
        for row, kept, span in zip(before, after, spans, strict=True):
            assert len(kept.unique()) <= 2**BITS
            rounding = 2**-8 * (2 * span + row.abs().max())  # of scale and least number, in bfloat16
            assert (row - kept).abs().max() <= span / (2 * (2**BITS - 1)) + rounding


def test_what_lies_on_the_numbers_stays():
    weight = (torch.arange(4 * GROUP) % 16).float().reshape(2, 2 * GROUP) * 0.5 - 4
    assert torch.equal(rounded(weight), weight)


def test_bits_with_all_that_is_stored():
    assert bits_of(256) == 4.25 and bits_of(192) == 4 + 32 * 2 / 192
