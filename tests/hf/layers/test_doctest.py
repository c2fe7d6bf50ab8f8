"""The examples in the documentation of layers do what they show."""

from __future__ import annotations

import doctest

from armorfact_hf.layers import linear


def test_the_example_of_a_factorized_linear_is_true():
    found = doctest.testmod(linear)
    assert found.attempted > 5 and found.failed == 0
