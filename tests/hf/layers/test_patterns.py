"""Patterns and dtypes that the packed product does not know."""

from __future__ import annotations

import pytest
import torch

from armorfact import Pattern
from armorfact_hf.layers.execution import PACKED, UNPACKED, Execution
from tests.hf.layers.cases import DTYPES, assert_rounded, random_inputs, random_layer, reference, runs


@pytest.mark.parametrize("pattern", ["4:8", "1:4", "2:8", "1:3", "1:2"])
@pytest.mark.parametrize("block", [None, (6, 24)])
def test_any_pattern_runs_unpacked_and_refuses_packed(pattern, block):
    for dtype in DTYPES:
        layer = random_layer(12, 48, block, dtype, pattern=Pattern.parse(pattern))
        for tokens in (1, 30):
            x = random_inputs(tokens, 48, dtype=dtype)
            assert_rounded(layer.use_(None)(x), layer, x)
            for strategy in ("unpacked", "dense"):
                assert_rounded(runs(layer, strategy, x), layer, x)
        with pytest.raises(ValueError, match=f"packed product is for 2:4 cores .*, got {pattern} in .*'unpacked'"):
            layer.use_(PACKED)


def test_float64_runs_and_refuses_packed():
    layer, x = random_layer(dtype=torch.float64), random_inputs(3, 36, dtype=torch.float64)
    for execution in (None, UNPACKED, Execution.always("dense")):
        y = layer.use_(execution)(x)
        torch.testing.assert_close(y, reference(layer, x), rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match=r"got 2:4 in torch\.float64: use 'unpacked'"):
        layer.use_(Execution(((1, "packed"), (None, "dense"))))
