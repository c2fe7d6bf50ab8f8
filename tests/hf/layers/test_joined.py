"""Layers that run as one compute what each computes by itself, side by side, and decide at run time alike."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from armorfact_hf.layers.execution import Execution
from armorfact_hf.layers.joined import JoinedLinears
from armorfact_hf.layers.linear import FactorizedLinear
from tests.hf.layers.cases import DTYPES, ON_CPU, int8_layer, random_inputs, random_layer, whole_layer

# Of one d_in: blocks of every kind beside each other, and rows that no vector, byte or group of four divides.
SIZES = ((70, 72, None), (66, 72, (33, 12)), (5, 72, (1, 72)), (48, 72, (48, 24)))
TOKENS = (0, 1, 3, 4, 24, 25, 140)


def layers_of(dtype: torch.dtype, sizes=SIZES) -> list[FactorizedLinear]:
    return [random_layer(*size, dtype, bias=False, seed=seed) for seed, size in enumerate(sizes)]


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_they_are_the_layers_side_by_side(tokens, dtype):
    layers = layers_of(dtype)
    x = random_inputs(tokens, 72, dtype=dtype)
    for chosen in (SIZES, SIZES[::-1], SIZES[:1], SIZES[1:2]):
        some = [layers[SIZES.index(size)] for size in chosen]
        with torch.no_grad():
            assert torch.equal(JoinedLinears(some)(x), torch.cat([layer(x) for layer in some], dim=-1))


def test_inputs_of_any_shape():
    joined, x = JoinedLinears(layers_of(torch.float32)), random_inputs(12, 72)
    y = joined(x)
    assert torch.equal(joined(x.view(3, 4, 72)), y.view(3, 4, -1))
    assert torch.equal(joined(x.T.contiguous().T), y)


@pytest.mark.parametrize("strategy", ON_CPU)
def test_a_choice_of_one_layer_is_heeded(strategy):
    layers, x = layers_of(torch.float32), random_inputs(2, 72)
    layers[1].use_(Execution.always(strategy))
    with torch.no_grad():
        assert torch.equal(JoinedLinears(layers)(x), torch.cat([layer(x) for layer in layers], dim=-1))


@pytest.mark.parametrize("tokens", [2, 30])
def test_the_operator_is_what_it_says(tokens):
    layers = layers_of(torch.float32)
    layers[2].use_(Execution.always("dense"))
    factors = [tensor if tensor is None else tensor.detach() for layer in layers for tensor in layer.tensors]
    torch.library.opcheck(
        torch.ops.armorfact.factorized_linears.default,
        (random_inputs(tokens, 72), factors, 2, 4, [layer.choice for layer in layers]),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_what_was_prepared_is_not_used_for_other_numbers_or_choices():
    layers, x = layers_of(torch.float32), random_inputs(2, 72)
    joined = JoinedLinears(layers)
    with torch.no_grad():
        joined(x)
        layers[0].values.mul_(2)  # in place
        layers[1].values = nn.Parameter(3 * layers[1].values, requires_grad=False)
        layers[2].use_(Execution.always("dense"))
        assert torch.equal(joined(x), torch.cat([layer(x) for layer in layers], dim=-1))
        joined.to(torch.bfloat16)
        x = x.bfloat16()
        assert torch.equal(joined(x), torch.cat([layer(x) for layer in layers], dim=-1))


@pytest.mark.parametrize("made", [random_layer, int8_layer, whole_layer])
def test_what_was_prepared_ends_with_a_cast_or_another_factor(made):
    layers, x = [made(bias=False, seed=seed) for seed in range(3)], random_inputs(2, 36)
    joined = JoinedLinears(layers)

    def each(x):
        return torch.cat([layer(x) for layer in layers], dim=-1)

    with torch.no_grad():
        assert torch.equal(joined(x), each(x))
        layers[0].right.data = layers[0].right.flip(0).contiguous()
        assert torch.equal(joined(x), each(x))
        for dtype in (torch.bfloat16, torch.float16):
            layers[1].to(dtype), layers[0].to(dtype), layers[2].to(dtype)  # not by the module that holds them
            assert torch.equal(joined(x.to(dtype)), each(x.to(dtype)))


def test_a_copy_takes_no_addresses_along():
    joined, x = JoinedLinears(layers_of(torch.float32)), random_inputs(2, 72)
    with torch.no_grad():
        y, before = joined(x), len(pickle.dumps(JoinedLinears(layers_of(torch.float32))))
        assert joined._prepared is not None and len(pickle.dumps(joined)) == before
        for another in (pickle.loads(pickle.dumps(joined)), copy.deepcopy(joined)):
            assert another._prepared is None and torch.equal(another(x), y)


def test_inputs_are_checked_as_by_each_layer():
    joined = JoinedLinears(layers_of(torch.float32))
    for x in (torch.zeros(2, 71), torch.zeros(30, 74), torch.zeros(2, 4000), torch.zeros(2, 72, dtype=torch.float64)):
        with pytest.raises(ValueError, match="expected an input"):
            joined(x)


@pytest.mark.parametrize("tokens", [2, 30])
def test_gradients_and_autocast_pass_as_through_each_layer(tokens):
    layers, x = layers_of(torch.float32), random_inputs(tokens, 72).requires_grad_()
    joined, found = JoinedLinears(layers), []
    for y in (joined(x), torch.cat([layer(x) for layer in layers], dim=-1)):
        found.append(torch.autograd.grad(y.square().sum(), x)[0])
    assert torch.equal(*found)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(joined(x), torch.cat([layer(x) for layer in layers], dim=-1))
        assert joined(x).dtype == torch.bfloat16


def test_a_graph_that_was_traced_once_decides_anew():
    torch._dynamo.reset()
    joined, counter = JoinedLinears(layers_of(torch.bfloat16)), CompileCounter()
    compiled = torch.compile(joined, backend=counter, dynamic=True, fullgraph=True)
    with torch.no_grad():
        for tokens in (30, 3, 17):
            x = random_inputs(tokens, 72, dtype=torch.bfloat16)
            assert torch.equal(compiled(x), joined(x))
    assert counter.frame_count == 1


def test_what_cannot_run_as_one_is_refused():
    good = layers_of(torch.float32)
    for others, reason in (
        ([], "not all of them are pruned"),
        ([*good, nn.Linear(72, 8, bias=False)], "not all of them are pruned"),
        ([*good, random_layer(8, 72, None, bias=True)], "biases of their own"),
        ([*good, random_layer(8, 36, None, bias=False)], "differ in their inputs"),
        ([*good, random_layer(8, 72, None, torch.bfloat16, bias=False)], "differ in their inputs"),
    ):
        with pytest.raises(ValueError, match=reason):
            JoinedLinears(others)


@pytest.mark.parametrize("transform", [lambda f, x: torch.func.vmap(f)(x), lambda f, x: make_fx(f)(x)(x)])
def test_they_can_be_transformed_and_traced(transform):
    joined, x = JoinedLinears(layers_of(torch.float32)), random_inputs(3, 72)
    with torch.no_grad():
        wanted = joined(x)  # from here on a launch is prepared
        torch.testing.assert_close(transform(joined, x), wanted)


def test_inputs_without_memory_give_outputs_without_memory():
    joined, x = JoinedLinears(layers_of(torch.float32)), random_inputs(3, 72)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert joined(mode.from_tensor(x)).shape == joined(x).shape


def test_factors_that_are_not_contiguous_are_read_anew():
    layers, x = layers_of(torch.float32), random_inputs(2, 72)
    left = layers[1].left.transpose(1, 2).contiguous().transpose(1, 2)
    layers[1].load_state_dict(layers[1].state_dict() | {"left": left}, assign=True)
    joined = JoinedLinears(layers)
    with torch.no_grad():
        assert torch.equal(joined(x), torch.cat([layer(x) for layer in layers], dim=-1))
        layers[1].left.mul_(2)
        assert torch.equal(joined(x), torch.cat([layer(x) for layer in layers], dim=-1))


def test_a_trace_computes_with_other_inputs():
    joined, x = JoinedLinears(layers_of(torch.float32)), random_inputs(3, 72)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", (DeprecationWarning, torch.jit.TracerWarning))
        traced = torch.jit.trace(joined, x, check_trace=False)
        torch.testing.assert_close(traced(2 * x), joined(2 * x))
