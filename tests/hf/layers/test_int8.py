"""Layers with an int8 core: the same product by every way to run them, and what of them is no parameter."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from armorfact import BlockDiagonal, Pattern, factorize, quantize_core, quantize_wrappers
from armorfact_hf.bench.layers import time_layers
from armorfact_hf.layers.execution import Execution, default_execution, runnable
from armorfact_hf.layers.format import LayerFormat
from armorfact_hf.layers.joined import JoinedLinears, refusal
from armorfact_hf.layers.linear import FactorizedLinear
from armorfact_hf.layers.stack import FactorizedStack
from armorfact_hf.layers.strategies.strategy import PAIR, Kind
from tests.hf.layers.cases import (
    DTYPES,
    ON_CPU,
    assert_rounded,
    int8_layer,
    random_inputs,
    random_layer,
    runs,
    whole_layer,
)

TOKENS = (0, 1, 3, 4, 5, 24, 25, 31, 129)
SIZES = ((1, 4, (1, 4)), (3, 108, (1, 108)), (66, 132, (33, 12)), (40, 192, (20, 48)), (8, 2080, (4, 52)))

MADE = (int8_layer, whole_layer)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("made", MADE)
def test_every_strategy_is_the_dense_product_at_every_border(made, size, dtype):
    for tokens in TOKENS:
        layer = made(*size, dtype, bias=tokens % 2 == 0)
        x = random_inputs(tokens, size[1], dtype=dtype)
        for strategy in ON_CPU:
            assert_rounded(runs(layer, strategy, x), layer, x)


@settings(max_examples=30, derandomize=True, deadline=None)
@given(data=st.data())
def test_every_strategy_is_the_dense_product(data):
    block = data.draw(st.integers(1, 40)), 4 * data.draw(st.integers(1, 17))
    blocks_out, blocks_in = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 5))
    dtype = data.draw(st.sampled_from(DTYPES))
    made, seed = data.draw(st.sampled_from(MADE)), data.draw(st.integers(0, 99))
    layer = made(blocks_out * block[0], blocks_in * block[1], block, dtype, seed=seed)
    x = random_inputs(data.draw(st.integers(0, 140)), layer.in_features, dtype=dtype)
    assert_rounded(runs(layer, data.draw(st.sampled_from(ON_CPU)), x), layer, x)


@pytest.mark.parametrize("made", MADE)
def test_other_patterns_and_float64_run_unpacked(made):
    for dtype, pattern in ((torch.float32, Pattern(4, 8)), (torch.float64, PAIR)):
        layer = made(12, 48, (6, 12), dtype, pattern=pattern)
        x = random_inputs(3, 48, dtype=dtype)
        assert default_execution(layer.kind) == Execution.always("unpacked")
        torch.testing.assert_close(layer(x), x @ layer.weight.T + layer.bias, rtol=1e-4, atol=1e-4)


def test_what_a_quantized_factorization_computes():
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    found = factorize(weight, None, block=16, max_sweeps=5)
    rounded = quantize_core(found, weight)
    layer = FactorizedLinear.of(rounded.core, rounded.left, rounded.right)
    x = random_inputs(5, 64)
    torch.testing.assert_close(layer(x), rounded.apply(x), rtol=1e-4, atol=1e-4)
    assert layer.nbytes == rounded.nbytes
    assert layer.nbytes == FactorizedLinear.of(found.core, found.left, found.right).nbytes - 3 * 32 * 32


def test_the_kept_values_are_no_parameter_and_keep_their_dtype():
    layer = int8_layer()
    assert {name for name, _ in layer.named_parameters()} == {"left", "right", "bias"}
    assert set(layer.state_dict()) == {"values", "positions", "left", "right", "bias"}
    half = copy.deepcopy(layer).to(torch.bfloat16)
    assert (half.values.dtype, half.left.dtype, half.dtype) == (torch.int8, torch.bfloat16, torch.bfloat16)
    assert torch.equal(half.values, layer.values)
    layer.requires_grad_(True)
    with pytest.raises(ValueError, match=r"expected an input of torch.float32"):
        layer(random_inputs(2, 36).bfloat16())
    assert repr(layer).endswith("block=(6, 12), core=int8)")


def test_a_choice_ends_with_a_cast():
    layer = int8_layer().use_(Execution.always("dense"))
    assert layer.merged.dtype == torch.float32
    assert layer.to(torch.bfloat16).merged is None


def test_gradients_pass_to_the_wrappers_and_to_the_input():
    layer, x = int8_layer(dtype=torch.float64, bias=False), random_inputs(3, 36, dtype=torch.float64)
    layer.requires_grad_(True)
    x.requires_grad_(True)
    layer(x).square().sum().backward()
    core, left, right = layer.core.dense(torch.float64), layer.left.detach().clone(), layer.right.detach().clone()
    left.requires_grad_(True), right.requires_grad_(True)
    y = x.detach() @ (torch.block_diag(*left) @ core @ torch.block_diag(*right)).T
    y.square().sum().backward()
    torch.testing.assert_close(layer.left.grad, left.grad)
    torch.testing.assert_close(layer.right.grad, right.grad)
    assert x.grad is not None


@pytest.mark.parametrize("made", MADE)
def test_autocast_and_compiled_graphs(made):
    layer, x = made(), random_inputs(3, 36)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert layer(x).dtype == torch.bfloat16
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(x), layer(x))


def test_layers_run_as_one_if_their_cores_are_alike():
    one, two = int8_layer(bias=False), int8_layer(bias=False, seed=1)
    joined = JoinedLinears([one, two])
    for tokens in (1, 7, 40):
        x = random_inputs(tokens, 36)
        torch.testing.assert_close(joined(x), torch.cat([one(x), two(x)], dim=-1))
    assert "dtypes" in refusal([one, random_layer(bias=False)])
    assert "dtypes" in refusal([one, whole_layer(bias=False)])
    whole = [whole_layer(bias=False), whole_layer(bias=False, seed=1)]
    for tokens in (1, 7, 40):
        x = random_inputs(tokens, 36)
        torch.testing.assert_close(JoinedLinears(whole)(x), torch.cat([each(x) for each in whole], dim=-1))


def test_wrappers_in_int8_hold_what_was_quantized_and_are_no_parameters():
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    rounded = quantize_wrappers(quantize_core(factorize(weight, None, block=16, max_sweeps=5), weight), weight)
    layer = FactorizedLinear.of(rounded.core, rounded.left, rounded.right)
    x = random_inputs(5, 64)
    torch.testing.assert_close(layer(x), rounded.apply(x), rtol=1e-4, atol=1e-4)
    assert (layer.nbytes, layer.dtype, layer.layout.wrapper_dtype) == (rounded.nbytes, torch.float32, "int8")
    assert {name for name, _ in layer.named_parameters()} == {"left_scales", "right_scales"}
    half = copy.deepcopy(layer).to(torch.bfloat16)
    assert (half.left.dtype, half.left_scales.dtype, half.dtype) == (torch.int8, torch.bfloat16, torch.bfloat16)
    assert repr(layer).endswith("block=(16, 16), core=int8, wrappers=int8)")
    again = FactorizedLinear.empty(layer.layout, False, torch.float32)
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again(x), layer(x))
    x.requires_grad_(True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(5, -1))


def test_int8_needs_wrappers_and_other_integers_are_unknown():
    with pytest.raises(ValueError, match="no core_dtype without blocks"):
        FactorizedLinear(12, 36, core_dtype=torch.int8)
    with pytest.raises(ValueError, match="no core_dtype without blocks"):
        FactorizedLinear.of(int8_layer().core)
    with pytest.raises(ValueError, match="no wrapper_dtype of experts"):
        LayerFormat("experts.up", (12, 36), PAIR, (6, 12), 4, "int8", "int8")
    with pytest.raises(ValueError, match="no wrapper_dtype around a core that has none"):
        LayerFormat("layer", (12, 36), PAIR, (6, 12), wrapper_dtype="int8")
    with pytest.raises(ValueError, match="expected a core_dtype of int8, got 'int4'"):
        LayerFormat("layer", (12, 36), PAIR, (6, 12), core_dtype="int4")


def test_on_a_gpu_few_tokens_go_through_the_packed_core():
    kind = Kind((64, 64), PAIR, torch.bfloat16, torch.device("cuda"), torch.int8)
    assert default_execution(kind) == Execution(((64, "packed"), (None, "unpacked")))
    assert "semi_structured" not in runnable(kind)


def test_a_bench_measures_them_and_tells_them_apart():
    model = torch.nn.ModuleList([int8_layer(), int8_layer(), random_layer(), whole_layer()])
    timings = time_layers(model, [1])
    kinds = ("", ", int8", ", int8, int8 wrappers")
    assert {timing.shape for timing in timings} == {f"12x36 in 6x12{kind}" for kind in kinds}
    assert all(set(ON_CPU) <= set(timing.seconds) for timing in timings)
    assert all(runs(layer, "packed", random_inputs(1, 36)).isfinite().all() for layer in model)


def test_whole_blocks_without_scales_have_ones():
    layer = whole_layer(bias=False)
    left, right = layer.wrappers
    for rows, columns in ((None, None), (left.rows, None), (None, left.columns)):
        bare = BlockDiagonal(left.blocks, rows, columns)
        found = FactorizedLinear.of(layer.core, bare, right)
        assert torch.equal(found.wrappers[0].dense(), bare.dense().float())
        assert found.weight.abs().max() > 0


def test_wrappers_of_two_kinds_are_refused():
    layer = whole_layer(bias=False)
    left, right = layer.wrappers
    plain = BlockDiagonal(torch.ones(left.blocks.shape))
    for pair in ((plain, right), (left, BlockDiagonal(torch.ones(right.blocks.shape)))):
        with pytest.raises(ValueError, match="expected A and B in one dtype"):
            FactorizedLinear.of(layer.core, *pair)
    scaled = BlockDiagonal(plain.blocks, left.rows, left.columns)
    with pytest.raises(ValueError, match="scales of int8 blocks only"):
        FactorizedLinear.of(layer.core, scaled, BlockDiagonal(torch.ones(right.blocks.shape)))


@pytest.mark.parametrize("made", [int8_layer, whole_layer])
def test_floating_tensors_are_not_cut_to_whole_ones(made):
    floating, whole = random_layer(bias=False), made(bias=False)
    before = {name: tensor.clone() for name, tensor in whole.state_dict().items()}
    with pytest.raises(RuntimeError, match=r"values is stored in torch\.float32, and the module holds torch\.int8"):
        whole.load_state_dict(floating.state_dict(), strict=False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in whole.state_dict().items())
    with pytest.raises(RuntimeError, match=r"values is stored in torch\.int8, and the module holds torch\.float32"):
        floating.load_state_dict(whole.state_dict(), strict=False)
    stack = FactorizedStack.of([int8_layer(bias=False)] * 2)
    with pytest.raises(RuntimeError, match=r"values is stored in torch\.float32, and the module holds torch\.int8"):
        stack.load_state_dict(FactorizedStack.of([floating] * 2).state_dict())
