"""Inputs of any shape, layout and dtype; under autocast, and on the meta device."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from armorfact_hf.layers.linear import FactorizedLinear
from tests.hf.layers.cases import DTYPES, ON_CPU, assert_rounded, random_inputs, random_layer, reference, runs

SHAPES = {
    "one row": lambda dtype: random_inputs(36, dtype=dtype),
    "a batch": lambda dtype: random_inputs(2, 3, 36, dtype=dtype),
    "four axes": lambda dtype: random_inputs(2, 1, 13, 36, dtype=dtype),
    "nothing": lambda dtype: random_inputs(0, 36, dtype=dtype),
    "an empty batch": lambda dtype: random_inputs(2, 0, 36, dtype=dtype),
    "transposed": lambda dtype: random_inputs(36, 5, dtype=dtype).T,
    "transposed, many": lambda dtype: random_inputs(36, 30, dtype=dtype).T,
    "transposed batch": lambda dtype: random_inputs(3, 2, 36, dtype=dtype).transpose(0, 1),
    "every second row": lambda dtype: random_inputs(10, 36, dtype=dtype)[::2],
    "every second column": lambda dtype: random_inputs(4, 72, dtype=dtype)[:, ::2],
    "one row expanded": lambda dtype: random_inputs(36, dtype=dtype).expand(30, 36),
    "an offset": lambda dtype: random_inputs(3, 37, dtype=dtype)[:, 1:],
}


@pytest.mark.parametrize("strategy", ON_CPU)
@pytest.mark.parametrize("shape", SHAPES)
def test_inputs_of_any_shape_and_layout(shape, strategy):
    for dtype in DTYPES:
        layer, x = random_layer(dtype=dtype), SHAPES[shape](dtype)
        before = x.clone()
        assert_rounded(runs(layer, strategy, x), layer, x)
        assert torch.equal(x, before)


def test_a_wrong_last_size_or_dtype_is_named():
    layer = random_layer()
    for shape in [(3, 35), (36, 3), (40,)]:
        with pytest.raises(ValueError, match=r"expected an input \(\.\.\., 36\), got \(" + str(shape[0])):
            layer(torch.zeros(shape))
    for dtype in (torch.float64, torch.bfloat16, torch.int64):
        with pytest.raises(ValueError, match=rf"expected an input of torch\.float32, .* got {dtype}"):
            layer(torch.zeros(3, 36, dtype=dtype))


def test_another_device_is_named():
    elsewhere = FactorizedLinear(12, 36, device="meta")
    with pytest.raises(ValueError, match="expected an input on meta, as the layer is, got cpu"):
        elsewhere(torch.ones(2, 36))
    with pytest.raises(ValueError, match="expected an input on cpu, as the layer is, got meta"):
        random_layer()(torch.ones(2, 36, device="meta"))


@pytest.mark.parametrize("strategy", ON_CPU)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_autocast_gives_what_a_linear_layer_gives(strategy, dtype, bias):
    layer = random_layer(dtype=dtype, bias=bias)
    linear = nn.Linear(36, 12, bias, dtype=dtype)
    for target in (torch.bfloat16, torch.float16):
        for given_dtype in (torch.float32, target):
            x = random_inputs(2, 5, 36, dtype=given_dtype)
            with torch.no_grad(), torch.autocast("cpu", target):
                assert linear(x).dtype == target
            with torch.autocast("cpu", target):
                y = runs(layer, strategy, x)
            coarser = torch.bfloat16 if torch.bfloat16 in (dtype, target) else target
            assert y.dtype == target
            assert_rounded(y.to(coarser), layer, x.to(target), coarser)


def test_autocast_leaves_float64_as_a_linear_layer_does():
    x = random_inputs(3, 36, dtype=torch.float64)
    layer = random_layer(dtype=torch.float64)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert nn.Linear(36, 12, dtype=torch.float64)(x).dtype == torch.float64
        y = layer(x)
    torch.testing.assert_close(y, reference(layer, x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64])
def test_autocast_takes_no_other_numbers(dtype):
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match=f"layer's own, got {dtype}"):
        random_layer()(torch.ones(2, 36, dtype=dtype))


def test_a_layer_without_memory_tells_the_shape_of_its_output():
    """On the meta device, where a linear layer runs too."""
    layer = FactorizedLinear(12, 36, block=(6, 12), bias=True, device="meta")
    for tokens in (1, 30):
        assert layer(torch.empty(2, tokens, 36, device="meta")).shape == (2, tokens, 12)
