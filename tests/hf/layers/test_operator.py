"""The one operator is what it says, and decides at run time, in graphs that were traced once too."""

from __future__ import annotations

from collections import Counter
from contextlib import contextmanager

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.fx.experimental.proxy_tensor import make_fx

from armorfact import Pattern
from armorfact_hf.layers.execution import FEW_PACKED, UNPACKED, Execution
from armorfact_hf.layers.linear import FactorizedLinear
from armorfact_hf.layers.strategies import packed, unpacked
from tests.hf.layers.cases import (
    DTYPES,
    ON_CPU,
    factorized,
    packed_operator,
    random_inputs,
    random_layer,
)

WITHIN_AND_BEYOND = (6, 30, 8, 9)  # of a choice whose limit is 8
FEW = Execution(((8, "packed"), (None, "unpacked")))


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()


@pytest.fixture
def ran(monkeypatch) -> Counter:
    """How often the two products ran since, whoever called them."""
    counted: Counter = Counter()
    for name, strategy in (("packed", packed), ("unpacked", unpacked)):

        def product(x, operands, name=name, real=strategy.product):
            counted[name] += 1
            return real(x, operands)

        monkeypatch.setattr(strategy, "product", product)
    return counted


@pytest.mark.parametrize("tokens", [0, 1, 5, 30])
@pytest.mark.parametrize("block", [(6, 12), None])
def test_the_operator_is_what_it_says(tokens, block):
    for dtype in DTYPES:
        layer = random_layer(block=block, dtype=dtype).use_(Execution.always("dense"))
        x = random_inputs(tokens, 36, dtype=dtype)
        blocks = (None, None) if block is None else (layer.left.detach(), layer.right.detach())
        held = (x, layer.values.detach(), layer.positions, *blocks, layer.merged, None, 2, 4)
        for text in ("", *(Execution.always(name).text for name in ON_CPU), FEW.text):
            torch.library.opcheck(
                torch.ops.armorfact.factorized_linear.default,
                (*held, text),
                test_utils=("test_schema", "test_faketensor"),
            )


# Traced once, run with any number of tokens


@contextmanager
def traced_once(layer: FactorizedLinear, tokens: int):
    """The layer as a server compiles it: traced with so many tokens, and every guard dropped."""
    counter = CompileCounter()
    options = {"guard_filter_fn": lambda guards: [False for _ in guards]}
    compiled = torch.compile(layer, fullgraph=True, backend=counter, dynamic=True, options=options)
    with torch.no_grad():
        compiled(random_inputs(tokens, layer.in_features, dtype=layer.values.dtype))
        yield compiled
    assert counter.frame_count == 1


@pytest.mark.parametrize(("traced", "run", "wanted"), [(512, 1, "packed"), (2, 512, "unpacked")])
@pytest.mark.parametrize("execution", [None, FEW_PACKED[16]])
def test_a_graph_traced_at_one_number_of_tokens_decides_anew_at_another(ran, traced, run, wanted, execution):
    """A decoding step in a graph that was traced for a prompt reads the packed core, and the reverse."""
    layer = random_layer(70, 132, (35, 12), torch.bfloat16).use_(execution)
    with traced_once(layer, traced) as compiled:
        x = random_inputs(run, 132, dtype=torch.bfloat16)
        ran.clear()
        y = compiled(x)
        assert ran == {wanted: 1}
        assert torch.equal(y, layer(x))


def test_a_symbolic_trace_holds_one_operator_and_no_number_of_tokens(ran):
    layer = random_layer(70, 132, (35, 12)).use_(FEW)
    with torch.no_grad():
        graph = make_fx(layer, tracing_mode="symbolic", _allow_non_fake_inputs=True)(random_inputs(512, 132))
        called = [node.target for node in graph.graph.nodes if "armorfact" in str(node.target)]
        assert called == [torch.ops.armorfact.factorized_linear.default] and not ran
        for tokens in WITHIN_AND_BEYOND:
            x = random_inputs(tokens, 132)
            ran.clear()
            assert torch.equal(graph(x), layer(x)) and set(ran) == {FEW.at(tokens)}


def test_one_graph_serves_every_number_of_tokens():
    layer, counter = random_layer(70, 132, (35, 12)).use_(FEW), CompileCounter()
    compiled = torch.compile(layer, fullgraph=True, backend=counter, dynamic=True)
    with torch.no_grad():
        for tokens in WITHIN_AND_BEYOND:
            compiled(random_inputs(tokens, 132))
    assert counter.frame_count == 1


@pytest.mark.parametrize("names", [(), ("values", "left", "right")])
def test_one_graph_with_gradients_serves_every_number_of_tokens(ran, names):
    layer, counter = random_layer(70, 132, (35, 12)).use_(FEW), CompileCounter()
    for name in names:
        getattr(layer, name).requires_grad_()
    compiled = torch.compile(layer, fullgraph=True, backend=counter, dynamic=True)
    for tokens in WITHIN_AND_BEYOND:
        x = random_inputs(tokens, 132).requires_grad_()
        y = compiled(x)
        y.sum().backward()
        assert torch.equal(y, layer(x)) and x.grad.isfinite().all()
    assert counter.frame_count == 1 and not ran
    assert all(getattr(layer, name).grad is not None for name in names)


@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16])
def test_autocast_is_compiled_into_one_graph(ran, given):
    """Within autocast into the layer's own dtype the chosen strategy runs; into another, PyTorch's own operators."""
    for dtype in (torch.float32, torch.bfloat16):
        torch._dynamo.reset()
        layer = random_layer(70, 132, (35, 12), dtype).use_(FEW)
        compiled = torch.compile(layer, fullgraph=True, backend="eager", dynamic=True)
        for tokens in WITHIN_AND_BEYOND:
            x = random_inputs(tokens, 132, dtype=given)
            ran.clear()
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                y = compiled(x)
                assert y.dtype == torch.bfloat16 and torch.equal(y, layer(x))
            assert set(ran) == ({FEW.at(tokens)} if dtype == torch.bfloat16 else set())


def test_a_second_copy_travels_with_the_call():
    """A graph holds no copy of its own: a weight that is merged anew is used."""
    layer = random_layer().use_(Execution.always("dense"))
    x = random_inputs(3, 36)
    with traced_once(layer, 7) as compiled:
        before = compiled(x)
        layer.values.mul_(2)
        layer.use_(Execution.always("dense"))
        torch.testing.assert_close(compiled(x) - layer.bias, 2 * (before - layer.bias))


def test_without_a_choice_the_default_for_the_device_is_looked_up_at_each_call(ran):
    for pattern, dtype, tokens, wanted in (
        ("2:4", torch.bfloat16, 16, "packed"),
        ("2:4", torch.bfloat16, 17, "unpacked"),
        ("2:4", torch.float32, 17, "packed"),
        ("4:8", torch.float32, 1, "unpacked"),
    ):
        layer = random_layer(12, 48, (6, 24), dtype, pattern=Pattern.parse(pattern))
        ran.clear()
        with torch.no_grad():
            layer(random_inputs(tokens, 48, dtype=dtype))
        assert ran == {wanted: 1}


def test_the_operator_takes_a_choice_as_text():
    layer, x = random_layer(70, 132, (35, 12)), random_inputs(3, 132)
    alone = factorized(layer, x, UNPACKED.text)
    assert torch.equal(alone + layer.bias, layer.use_(UNPACKED)(x))
    with pytest.raises(ValueError, match="a strategy is one of"):
        torch.ops.armorfact.factorized_linear(x, layer.values, layer.positions, *[None] * 4, 2, 4, '[[null, "fast"]]')


@pytest.mark.parametrize("strategy", ON_CPU)
@pytest.mark.parametrize("dynamic", [None, True])
def test_compile_sees_one_graph(strategy, dynamic):
    layer = random_layer().use_(Execution.always(strategy))
    compiled = torch.compile(layer, fullgraph=True, backend="eager", dynamic=dynamic)
    for tokens in (1, 3, 24, 25, 130):
        x = random_inputs(2, tokens, 36)
        with torch.no_grad():
            assert torch.equal(compiled(x), layer(x))


def test_a_compiled_layer_changes_its_strategy_with_the_number_of_tokens():
    layer = random_layer(70, 132, (35, 12)).use_(FEW)
    compiled = torch.compile(layer, fullgraph=True, backend="eager", dynamic=True)
    for tokens in WITHIN_AND_BEYOND:
        x = random_inputs(tokens, 132)
        with torch.no_grad():
            assert torch.equal(compiled(x), layer(x))
            assert torch.equal(compiled(x), packed_operator(layer, x)) == (tokens <= 8)


def test_a_compressed_core_is_traced_without_a_device():
    """Shapes only: cuSPARSELt's form of a core (32, 16) lies on the meta device."""
    layer = FactorizedLinear(32, 16, dtype=torch.float16, device="meta")
    layer.compressed = torch.empty(32, 9, dtype=torch.float16, device="meta")
    text = Execution.always("semi_structured").text
    traced = torch.compile(lambda x: factorized(layer, x, text), backend="eager", fullgraph=True, dynamic=True)
    for tokens in (5, 64):
        y = traced(torch.empty(tokens, 16, dtype=torch.float16, device="meta"))
        assert y.shape == (tokens, 32) and y.dtype == torch.float16
