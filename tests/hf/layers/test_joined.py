"""Layers that run as one compute what each computes by itself, side by side, and decide at run time alike."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from armorfact_hf.layers.execution import Execution
from armorfact_hf.layers.joined import JoinedLinears
from armorfact_hf.layers.linear import FactorizedLinear
from tests.hf.layers.cases import DTYPES, ON_CPU, random_inputs, random_layer

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


def test_a_graph_that_was_traced_once_decides_anew():
    torch._dynamo.reset()
    joined = JoinedLinears(layers_of(torch.bfloat16))
    compiled = torch.compile(joined, backend="eager", dynamic=True)
    with torch.no_grad():
        for tokens in (30, 3, 17):
            x = random_inputs(tokens, 72, dtype=torch.bfloat16)
            assert torch.equal(compiled(x), joined(x))


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
