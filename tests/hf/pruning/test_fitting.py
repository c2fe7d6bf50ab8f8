"""Blocks that fit the share of every rank."""

from __future__ import annotations

import pytest

from armorfact_hf.pruning.config import PruneConfig
from armorfact_hf.pruning.fitting import fitting_block


@pytest.mark.parametrize(
    ("shape", "ranks", "expected"),
    [
        ((4096, 4096), 1, (128, 128)),
        ((4096, 4096), 8, (128, 128)),
        ((11008, 4096), 1, (128, 128)),
        ((11008, 4096), 8, (32, 32)),  # 1376 rows a rank
        ((1024, 4096), 1, (64, 64)),
        ((1024, 4096), 32, (32, 32)),
        ((576, 576), 3, (32, 32)),
    ],
)
def test_auto(shape, ranks, expected):
    block, reason = fitting_block(shape, PruneConfig(tensor_parallel=ranks))
    assert (block, reason) == (expected, "")


@pytest.mark.parametrize(
    ("shape", "settings", "message"),
    [
        ((576, 576), {"tensor_parallel": 5}, "576x576 cannot be cut into 5 equal parts"),
        ((256, 24), {"tensor_parallel": 2}, "cuts a byte of positions in two"),
        (
            (11008, 4096),
            {"block": 64, "tensor_parallel": 8},
            "block 64 does not fit 1376x512, what one of 8 ranks holds",
        ),
        (
            (30, 32),
            {"tensor_parallel": 2},
            "no block of up to 128 divides 15 and 16, what one of 2 ranks holds of 30x32",
        ),
    ],
)
def test_a_layer_that_does_not_fit(shape, settings, message):
    block, reason = fitting_block(shape, PruneConfig(**settings))
    assert block is None and message in reason
