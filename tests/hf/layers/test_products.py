"""Every way to run a pruned layer on a CPU gives the dense product, within the rounding of the layer's dtype."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from armorfact import Core
from armorfact_hf.layers.execution import PACKED
from armorfact_hf.layers.kernels import cpu_packed
from armorfact_hf.layers.linear import FactorizedLinear
from armorfact_hf.layers.strategies import unpacked
from armorfact_hf.layers.strategies.strategy import PAIR
from tests.hf.layers.cases import DTYPES, ON_CPU, assert_rounded, factorized, random_inputs, random_layer, runs

# Around a group of four tokens, where packed changes its kernel (24), and where a panel of tokens ends (128).
TOKENS = (0, 1, 2, 3, 4, 5, 7, 24, 25, 31, 128, 129, 200)
# (d_out, d_in, block): tails of vectors (16 kept values), bytes (8 columns), panels (64 columns) and row groups (4).
SIZES = (
    (4, 4, None),
    (1, 4, (1, 4)),
    (4, 4, (4, 4)),
    (70, 68, None),
    (3, 108, (1, 108)),
    (66, 132, (33, 12)),
    (40, 192, (20, 48)),
    (7, 44, (7, 44)),
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_every_strategy_is_the_dense_product_at_every_border(size, dtype):
    for tokens in TOKENS:
        layer = random_layer(*size, dtype, bias=tokens % 2 == 0)
        x = random_inputs(tokens, size[1], dtype=dtype)
        for strategy in ON_CPU:
            assert_rounded(runs(layer, strategy, x), layer, x)


@settings(max_examples=60, derandomize=True, deadline=None)
@given(data=st.data())
def test_every_strategy_is_the_dense_product(data):
    blocks_out, blocks_in = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 5))
    block = data.draw(st.integers(1, 40)), 4 * data.draw(st.integers(1, 17))
    layer = random_layer(
        blocks_out * block[0],
        blocks_in * block[1],
        data.draw(st.sampled_from([block, None])),
        data.draw(st.sampled_from(DTYPES)),
        data.draw(st.booleans()),
        seed=data.draw(st.integers(0, 99)),
    )
    x = random_inputs(data.draw(st.integers(0, 140)), layer.in_features, dtype=layer.values.dtype)
    assert_rounded(runs(layer, data.draw(st.sampled_from(ON_CPU)), x), layer, x)


def test_a_core_of_zeros_leaves_the_bias():
    layer = random_layer()
    layer.values.zero_()
    for tokens in (1, 4, 30):
        for strategy in ON_CPU:
            y = runs(layer, strategy, random_inputs(tokens, 36))
            assert torch.equal(y, layer.bias.expand(tokens, -1))


@pytest.mark.parametrize("rows", [1, 3, 5, 64])
@pytest.mark.parametrize("block", [None, (35, 68)])
def test_rows_taken_in_pieces_make_the_same_product(rows, block, monkeypatch):
    layer, x = random_layer(70, 68, block), random_inputs(30, 68)
    whole = {strategy: runs(layer, strategy, x) for strategy in ("packed", "unpacked")}
    monkeypatch.setattr(cpu_packed, "MOST_ROWS", rows)
    monkeypatch.setattr(unpacked, "UNPACKED_BYTES", rows * 68 * 4)
    assert torch.equal(runs(layer, "packed", x), whole["packed"])
    assert_rounded(runs(layer, "unpacked", x), layer, x)


@pytest.mark.parametrize("tokens", [1, 5, 30])
def test_one_wrapper_alone(tokens):
    layer, x = random_layer(bias=False), random_inputs(tokens, 36)
    for dropped in ("left", "right"):
        other = copy.deepcopy(layer)
        blocks = getattr(other, dropped)
        blocks.copy_(torch.eye(blocks.shape[-1]).expand_as(blocks))
        alone = copy.deepcopy(layer)
        setattr(alone, dropped, None)
        assert_rounded(factorized(alone, x, PACKED.text), other, x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extreme_values_pass_unharmed(dtype):
    """The largest, the smallest normal and subnormal numbers, and signed zeros, times one."""
    info = torch.finfo(dtype)
    numbers = torch.tensor([info.max, -info.max, info.tiny, -info.tiny, info.smallest_normal, -0.0, 1.0, -1.5])
    if dtype == torch.float16:
        numbers = torch.cat([numbers, torch.tensor([2.0**-24, -(2.0**-24), 2.0**-15])])
    numbers = numbers.to(dtype)
    dense = torch.zeros(len(numbers), 64, dtype=dtype)
    for tokens in (1, 4, 30):
        for column in (0, 3, 29, 62):
            dense.zero_()
            dense[:, column] = numbers
            layer = FactorizedLinear.of(Core.from_dense(dense, PAIR))
            x = torch.zeros(tokens, 64, dtype=dtype)
            x[:, column] = 1
            assert torch.equal(runs(layer, "packed", x), numbers.expand(tokens, -1))
