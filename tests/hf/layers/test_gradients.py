"""Gradients are those of the dense product, and where none are asked for the chosen strategy runs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional

from armorfact import Core, Pattern
from armorfact_hf.layers.execution import PACKED, Execution
from armorfact_hf.layers.joined import JoinedLinears
from armorfact_hf.layers.linear import FactorizedLinear
from armorfact_hf.layers.strategies.strategy import PAIR
from tests.hf.layers.cases import ON_CPU, in_float64, packed_operator, random_inputs, random_layer


def trained(layer: FactorizedLinear, names: tuple[str, ...]) -> list[Tensor]:
    found = [getattr(layer, name) for name in names]
    return [tensor.requires_grad_() for tensor in found if tensor is not None]


@pytest.mark.parametrize("block", [(3, 4), None])
@pytest.mark.parametrize("pattern", ["2:4", "4:8"])
def test_gradients_are_those_of_finite_differences(block, pattern):
    layer = random_layer(6, 16, block, torch.float64, pattern=Pattern.parse(pattern))
    given = trained(layer, ("values", "left", "right", "bias"))
    x = random_inputs(2, 16, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, *_: layer(x), (x, *given))


@pytest.mark.parametrize("strategy", [None, *ON_CPU])
@pytest.mark.parametrize("names", [(), ("values",), ("left",), ("right",), ("bias",), ("values", "left", "right")])
@pytest.mark.parametrize("tokens", [3, 30])
def test_gradients_are_those_of_the_dense_product(strategy, names, tokens):
    layer = random_layer().use_(None if strategy is None else Execution.always(strategy))
    given = trained(layer, names)
    x = random_inputs(tokens, 36).requires_grad_("bias" not in names)
    exact = in_float64(layer)
    twins = [x.detach().double().requires_grad_(x.requires_grad), *(getattr(exact, name) for name in names)]
    left, right = (torch.block_diag(*getattr(exact, name)) for name in ("left", "right"))
    core = Core(exact.values, exact.positions, PAIR, 36).dense()
    y = functional.linear(twins[0], left @ core @ right, exact.bias)
    weights = random_inputs(*y.shape, seed=2)
    (y * weights).sum().backward()
    (layer(x) * weights).sum().backward()
    for ours, wanted in zip([x, *given], twins, strict=True):
        assert (ours.grad is None) == (wanted.grad is None)
        if ours.grad is not None:
            torch.testing.assert_close(ours.grad.double(), wanted.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("tokens", [3, 30])
def test_without_gradients_the_chosen_strategy_runs(mode, tokens):
    layer = random_layer(70, 132, (35, 12))
    x = random_inputs(tokens, 132).requires_grad_()
    trained(layer, ("values", "left", "right"))
    layer.use_(PACKED)
    with mode():
        y, wanted = layer(x), packed_operator(layer, x)
    assert torch.equal(y, wanted) and not y.requires_grad
    assert not torch.equal(layer(x), wanted)  # or the comparison would tell nothing


# What PyTorch itself says of its own forward mode.
SCRIPTED = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")


@SCRIPTED
@pytest.mark.parametrize("joined", [False, True])
def test_derivatives_in_forward_mode_are_those_of_the_dense_product(joined):
    layer = random_layer(bias=False)
    module = JoinedLinears([layer, layer]) if joined else layer
    weight = torch.cat([layer.weight] * len(module)) if joined else layer.weight
    x, change = random_inputs(3, 36), random_inputs(3, 36, seed=5)
    torch.testing.assert_close(torch.func.jvp(module, (x,), (change,))[1], change @ weight.T)
    torch.testing.assert_close(torch.func.jacfwd(module)(x[0]), weight)
    with torch.no_grad(), forward_ad.dual_level():
        y = module(forward_ad.make_dual(x, change))
        torch.testing.assert_close(forward_ad.unpack_dual(y).tangent, change @ weight.T)


@SCRIPTED
def test_the_change_of_a_factor_is_seen_in_forward_mode():
    layer, x = random_layer(bias=False), random_inputs(3, 36)
    change = torch.ones_like(layer.left)

    def of_left(left):
        return torch.func.functional_call(layer, {"left": left}, x)

    found = torch.func.jvp(of_left, (layer.left,), (change,))[1]
    torch.testing.assert_close(found, of_left(layer.left + change) - of_left(layer.left), rtol=1e-4, atol=1e-4)
