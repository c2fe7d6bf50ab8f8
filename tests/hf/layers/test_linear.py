"""A factorized layer applies A C B, saves plain tensors, and is restored from them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional

from armorfact import BlockDiagonal, factorize, wanda
from armorfact.packed import Core
from armorfact.pattern import Pattern
from armorfact_hf.layers.linear import FactorizedLinear
from tests.hf.layers.cases import int8_layer, random_inputs, random_layer, runs


def random_weight(d_out=24, d_in=32):
    return torch.randn(d_out, d_in, generator=torch.Generator().manual_seed(0))


def factorized(pattern="2:4", bias=True, block=(8, 16)):
    result = factorize(random_weight(), None, block=block, pattern=pattern, max_sweeps=2)
    layer = FactorizedLinear.of(result.core, result.left, result.right, torch.randn(24) if bias else None)
    return layer, result


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8", "2:8"])
@pytest.mark.parametrize("bias", [True, False])
def test_it_computes_the_product_with_its_weight(pattern, bias):
    layer, result = factorized(pattern, bias)
    torch.testing.assert_close(layer.weight, result.dense())
    for shape in [(3, 32), (2, 5, 32), (32,), (0, 32)]:
        x = torch.randn(shape)
        torch.testing.assert_close(layer(x), functional.linear(x, result.dense(), layer.bias), rtol=1e-4, atol=1e-5)


def test_a_core_alone_is_a_pruned_linear():
    pruned = wanda(random_weight(), None)
    layer = FactorizedLinear.of(Core.from_dense(pruned, Pattern(2, 4)))
    assert layer.block is None
    assert torch.equal(layer.weight, pruned)
    x = torch.randn(3, 32)
    torch.testing.assert_close(layer(x), functional.linear(x, pruned))


@pytest.mark.parametrize("pattern", ["2:4", "1:4"])
def test_its_tensors_restore_it_bit_for_bit(pattern):
    layer, _ = factorized(pattern)
    other = FactorizedLinear(24, 32, pattern, (8, 16), bias=True)
    x = torch.randn(3, 32)
    before = other(x)  # unpacks a core of zeros, which must not be taken for the one that is loaded
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))
    assert not torch.equal(other(x), before)


def test_its_bytes_are_those_of_the_core_and_the_wrappers():
    layer, result = factorized(bias=False)
    assert layer.nbytes == result.nbytes
    half = FactorizedLinear(24, 32, "2:4", dtype=torch.bfloat16)
    assert half.nbytes == 24 * 32 + 24 * 32 // 2 // 4  # two bytes for each kept value, two bits for its position


def test_a_change_of_dtype_is_seen():
    layer, _ = factorized()
    x = torch.randn(3, 32)
    y = layer(x)
    layer.to(torch.bfloat16)
    assert layer(x.bfloat16()).dtype == torch.bfloat16
    torch.testing.assert_close(layer(x.bfloat16()).float(), y, rtol=0.1, atol=0.1)


def test_no_gradient_is_asked_of_the_factors_but_passes_through_to_the_input():
    layer, _ = factorized()
    x = torch.randn(3, 32, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None and not any(p.requires_grad for p in layer.parameters())


def test_it_says_what_it_is():
    assert "pattern=2:4, block=(8, 16)" in repr(factorized()[0])


@pytest.mark.parametrize(("sizes", "block"), [((8, 18), None), ((10, 16), (4, 4)), ((8, 16), (4, 6)), ((0, 16), None)])
def test_sizes_that_do_not_divide_are_refused(sizes, block):
    with pytest.raises(ValueError, match="expected"):
        FactorizedLinear(*sizes, block=block)


def test_factors_that_do_not_fit_are_refused():
    _, result = factorized()
    core, left, right = result.core, result.left, result.right
    with pytest.raises(ValueError, match="both wrappers or neither"):
        FactorizedLinear.of(core, left)
    with pytest.raises(ValueError, match=r"left has shape \(1, 8, 8\), a core of \(24, 32\) needs \(3, 8, 8\)"):
        FactorizedLinear.of(core, BlockDiagonal(left.blocks[:1]), right)
    with pytest.raises(ValueError, match=r"bias has shape \(1,\)"):
        FactorizedLinear.of(core, left, right, torch.zeros(1))


def test_positions_need_not_lie_row_after_row():
    layer = random_layer(bias=False)
    state = layer.state_dict()
    state["positions"] = state["positions"].T.contiguous().T
    spread = FactorizedLinear(12, 36, block=(6, 12))
    spread.load_state_dict(state, assign=True)
    assert not spread.positions.is_contiguous()
    for tokens in (2, 30):
        for strategy in ("packed", "unpacked", "dense"):
            x = random_inputs(tokens, 36)
            assert torch.equal(runs(spread, strategy, x), runs(layer, strategy, x))


def test_the_floating_dtype_may_be_named():
    assert FactorizedLinear(12, 36, block=(6, 12), core_dtype=torch.float32).layout.core_dtype is None
    assert FactorizedLinear(12, 36, block=(np.int64(6), np.int64(12))).block == (6, 12)
    with pytest.raises(TypeError, match="float"):
        FactorizedLinear(12, 36, block=(6.9, 12))


@pytest.mark.parametrize("name", ["positions", "values"])
def test_whole_numbers_of_another_kind_are_not_loaded(name):
    layer = int8_layer()
    held = layer.state_dict()
    with pytest.raises(RuntimeError, match=f"{name} is stored in torch.int64, and the module holds torch"):
        layer.load_state_dict(held | {name: held[name].long()}, assign=True)


def test_what_is_no_tensor_is_named_by_pytorch():
    layer = random_layer()
    with pytest.raises(RuntimeError, match=r"(?s)values.*received <class 'numpy.ndarray'>"):
        layer.load_state_dict(layer.state_dict() | {"values": layer.values.numpy()})


def test_wrappers_of_two_dtypes_are_not_read_past_their_end():
    layer = random_layer()
    layer.right.data = layer.right.data.half()
    with torch.no_grad(), pytest.raises(ValueError, match=r"A and B in one dtype, got .*torch\.float16"):
        layer(random_inputs(1, 36))
