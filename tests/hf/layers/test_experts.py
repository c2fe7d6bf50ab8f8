"""Pruned experts: all that were chosen in one compiled call, or one after another, agree with the dense weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from armorfact import Pattern
from armorfact_hf.layers.experts import FactorizedExperts
from armorfact_hf.layers.format import LayerFormat
from armorfact_hf.layers.kernels.bf16 import has_bf16
from armorfact_hf.layers.routed import Gating, by_expert
from armorfact_hf.layers.stack import FactorizedStack
from armorfact_hf.layers.strategies import packed_experts
from armorfact_hf.layers.strategies.strategy import PAIR, Kind
from armorfact_hf.pruning.config import PruneConfig
from armorfact_hf.pruning.prune import prune_
from tests.hf.checkpoint.cases import random_layer
from tests.hf.layers import cases
from tests.hf.models import random_tokens, tiny_model

EXPERTS, WIDTH, INNER = 5, 16, 24


class Dense(nn.Module):
    """What gating asks of an experts module."""

    is_concatenated = True

    def _apply_gate(self, gate_up):
        gate, up = gate_up.chunk(2, dim=-1)
        return torch.tanh(gate) * up

    def act_fn(self, up):
        return torch.tanh(up)


def experts_of(gate=True, block=(8, 8), bias=True, dtype=torch.float32, pattern="2:4") -> FactorizedExperts:
    shapes = {"gate": (INNER, WIDTH), "up": (INNER, WIDTH), "down": (WIDTH, INNER)}
    stacks = {
        name: FactorizedStack.of(
            [random_layer(pattern, block, bias, dtype, shape, seed=10 * place + e) for e in range(EXPERTS)]
        )
        for place, (name, shape) in enumerate(shapes.items())
        if gate or name != "gate"
    }
    return FactorizedExperts(stacks, Gating(Dense()))


def call(tokens: int, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.stack([torch.randperm(EXPERTS - 1, generator=generator)[:2] for _ in range(tokens)])
    weights = torch.rand(tokens, 2, generator=generator)
    return torch.randn(tokens, WIDTH, generator=generator).to(dtype), chosen, weights.to(dtype)


def expected(experts: FactorizedExperts, x, chosen, weights):
    """By hand, in float64, a token at a time."""
    rows = []
    for token in range(len(x)):
        total = torch.zeros(WIDTH, dtype=torch.float64)
        for expert, weight in zip(chosen[token].tolist(), weights[token], strict=True):
            layers = {name: stack.layer(expert).double() for name, stack in experts.stacks.items()}
            up = layers["up"](x[token].double())
            inner = torch.tanh(layers["gate"](x[token].double())) * up if "gate" in layers else torch.tanh(up)
            total += weight.double() * layers["down"](inner)
        rows.append(total)
    return torch.stack(rows)


def close(found, wanted, dtype) -> bool:
    tolerance = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}[dtype]
    return bool(((found.double() - wanted).norm() <= tolerance * wanted.norm()).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 9])
@pytest.mark.parametrize(("block", "bias", "gate"), [((8, 8), True, True), ((4, 8), False, True), (None, True, False)])
@torch.no_grad()
def test_all_at_once_is_one_after_another(dtype, tokens, block, bias, gate):
    experts, (x, chosen, weights) = experts_of(gate, block, bias, dtype), call(tokens, dtype)
    assert all(stack.runs_packed(x, [tokens] * EXPERTS) for stack in experts.stacks.values())
    found = experts(x, chosen, weights)
    assert found.dtype == dtype and close(found, expected(experts, x, chosen, weights), dtype)
    apart = by_expert(x, chosen, weights, EXPERTS, experts._apart)
    assert close(apart, expected(experts, x, chosen, weights), dtype)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "block"),
    [
        *(((75, 80), block) for block in (None, (5, 20), (25, 80))),  # vectors cut at their ends
        *(((96, 128), block) for block in (None, (32, 64), (3, 32), (96, 4))),  # in pairs, all of it or some
        ((65, 64), None),
    ],
    ids=str,
)
@pytest.mark.parametrize("core", ["floating", "int8"])
@torch.no_grad()
def test_few_and_some_rows_of_any_size(core, shape, block, dtype):
    if core == "int8" and block is None:
        pytest.skip("a core in int8 has wrappers")
    counts, made = [1, 0, 4, 7], cases.random_layer if core == "floating" else cases.int8_layer
    layers = [made(*shape, block, dtype, bias=False, seed=seed) for seed in range(len(counts))]
    stack, x = FactorizedStack.of(layers), cases.random_inputs(sum(counts), shape[1], dtype=dtype)
    y = packed_experts.product(x, counts, [(stack.values, stack.positions, stack.left, stack.right)])
    for layer, rows, found in zip(layers, x.split(counts), y.split(counts), strict=True):
        cases.assert_rounded(found, layer, rows)


@pytest.fixture
def tiles(monkeypatch):
    """Many rows of an expert go in tiles, wherever the processor can."""
    monkeypatch.setattr(packed_experts, "beats_dense", has_bf16)


@pytest.mark.parametrize(
    ("shape", "block"),
    [
        *(((75, 80), block) for block in (None, (5, 20), (25, 80))),  # odd blocks, and columns beyond a panel
        *(((96, 128), block) for block in (None, (32, 64), (96, 4))),
        ((7, 12), (1, 3)),
        ((600, 4), None),  # more rows than a thread takes at a time
    ],
    ids=str,
)
@pytest.mark.usefixtures("tiles")
@torch.no_grad()
def test_many_rows_in_bfloat16(shape, block):
    counts = [1, 0, 33, 64, 70, 190]
    dtype = torch.bfloat16
    layers = [cases.random_layer(*shape, block, dtype, bias=False, seed=seed) for seed in range(len(counts))]
    stack, x = FactorizedStack.of(layers), cases.random_inputs(sum(counts), shape[1], dtype=dtype)
    factors = (stack.values, stack.positions, stack.left, stack.right)
    y = packed_experts.product(x, counts, [factors, factors])
    for layer, rows, found in zip(layers, x.split(counts), y.split(counts), strict=True):
        for side in found.split(shape[0], dim=1):
            cases.assert_rounded(side.contiguous(), layer, rows)


@pytest.mark.parametrize(("block", "bias", "gate"), [((8, 8), True, True), ((4, 8), False, True), (None, True, False)])
@pytest.mark.usefixtures("tiles")
@torch.no_grad()
def test_many_tokens_in_bfloat16(block, bias, gate):
    dtype = torch.bfloat16
    experts, given_call = experts_of(gate, block, bias, dtype), call(150, dtype)
    assert close(experts(*given_call), expected(experts, *given_call), dtype)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss"])
@pytest.mark.usefixtures("tiles")
@torch.no_grad()
def test_many_tokens_of_each_family(family):
    model = tiny_model(family, dtype=torch.bfloat16)
    prune_(model, random_tokens(), PruneConfig(method="magnitude", baselines=()))
    experts = next(module for module in model.modules() if isinstance(module, FactorizedExperts))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(150, experts.up.layout.shape[1], generator=generator).bfloat16()
    chosen = torch.rand(150, experts.num_experts, generator=generator).topk(2).indices
    weights = torch.rand(150, 2, generator=generator).bfloat16()
    one_after_another = experts.separate().double()
    assert close(experts(x, chosen, weights), one_after_another(x.double(), chosen, weights.double()), torch.bfloat16)


@settings(max_examples=50, derandomize=True, deadline=None)
@given(counts=st.lists(st.integers(0, 200), min_size=1, max_size=9), in_tiles=st.booleans())
def test_every_row_is_taken_once(counts, in_tiles):
    few, some = packed_experts._few_and_tiles(counts, in_tiles)
    assert in_tiles or not len(some)
    assert (some[:, 2] <= 64).all() and (not in_tiles or (few[:, 2] <= 32).all())
    owners = np.repeat(np.arange(len(counts)), counts)
    taken = np.zeros(len(owners), dtype=int)
    for expert, first, count in [*few, *some]:
        assert count and (owners[first : first + count] == expert).all()
        taken[first : first + count] += 1
    assert (taken == 1).all()


def test_any_number_of_rows_in_bfloat16_where_the_processor_multiplies_pairs(monkeypatch):
    kind = Kind((64, 64), PAIR, torch.bfloat16, torch.device("cpu"))
    for pairs in (True, False):
        monkeypatch.setattr(packed_experts, "beats_dense", lambda pairs=pairs: pairs)
        assert packed_experts.runs(kind, [24]) and packed_experts.runs(kind, [1000]) == pairs
        assert not packed_experts.runs(kind._replace(dtype=torch.float32), [25])


@torch.no_grad()
def test_many_tokens_go_one_expert_after_another():
    experts, given = experts_of(), call(60)
    assert not experts.up.runs_packed(given[0], [25, 0, 0, 0, 0])
    assert experts.up.runs_packed(given[0], [40, 8, 0, 0, 0]) and not experts.up.runs_packed(given[0], [41, 8, 0, 0, 0])
    assert close(experts(*given), expected(experts, *given), torch.float32)


@torch.no_grad()
def test_another_pattern_runs_unpacked():
    experts, given = experts_of(pattern="1:4"), call(3)
    assert not experts.up.runs_packed(given[0], [3])
    assert close(experts(*given), expected(experts, *given), torch.float32)


def test_a_gradient_or_autocast_takes_the_plain_way():
    experts, (x, chosen, weights) = experts_of(), call(3)
    assert not experts.up.runs_packed(x.clone().requires_grad_(), [3])
    with torch.autocast("cpu", torch.bfloat16):
        assert not experts.up.runs_packed(x, [3])
        found = experts(x, chosen, weights)
    assert found.dtype == torch.float32 and close(found, expected(experts, x, chosen, weights), torch.bfloat16)


def test_no_row_is_no_work():
    stack = experts_of().up
    factors = (stack.values, stack.positions, stack.left, stack.right)
    assert packed_experts.product(torch.ones(0, WIDTH), [0] * EXPERTS, [factors]).shape == (0, INNER)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("tokens", [1, 9, 600])
@torch.no_grad()
def test_on_a_gpu(tokens):
    experts, given = experts_of(dtype=torch.bfloat16), call(tokens, torch.bfloat16)
    wanted = expected(experts, *given)
    found = experts.cuda()(*(tensor.cuda() for tensor in given))
    assert experts.up.runs_packed(given[0].cuda(), [tokens]) == (tokens <= 256)
    assert close(found.cpu(), wanted, torch.bfloat16)


@torch.no_grad()
def test_a_stack_of_int8_cores_keeps_their_dtypes_and_gives_its_layers_back():
    layers = [cases.int8_layer(dtype=torch.bfloat16, seed=seed) for seed in range(3)]
    stack = FactorizedStack.of(layers)
    assert (stack.values.dtype, stack.dtype, stack.layout.core_dtype) == (torch.int8, torch.bfloat16, "int8")
    assert {name for name, _ in stack.named_parameters()} == {"left", "right", "bias"}
    for expert, layer in enumerate(layers):
        again = stack.layer(expert).state_dict()
        assert all(torch.equal(again[name], tensor) for name, tensor in layer.state_dict().items())
    x = cases.random_inputs(2, 36, dtype=torch.bfloat16)
    assert stack.runs_packed(x, [1, 1, 0])
    factors, bias = stack.each[1]
    torch.testing.assert_close(stack.product(factors, bias, x), layers[1](x))


def test_only_like_layers_are_stacked():
    with pytest.raises(ValueError, match="no wrapper_dtype of experts"):
        FactorizedStack.of([cases.whole_layer(), cases.whole_layer(seed=1)])
    with pytest.raises(ValueError, match="of one shape, block and dtype can be stacked, got 2 kinds"):
        FactorizedStack.of([random_layer(), random_layer(block=(4, 4))])


def test_the_names_of_the_layers_in_a_stack():
    layout = LayerFormat("mlp.experts.up", (8, 8), Pattern(2, 4), None, 2)
    assert layout.members == ["mlp.experts.0.up", "mlp.experts.1.up"]
    assert layout.tensors["values"] == (2, 8, 4) and layout.bias == (2, 8)
    assert LayerFormat("q_proj", (8, 8), Pattern(2, 4), None).members == ["q_proj"]


def test_gate_and_up_are_stored_alike():
    up = FactorizedStack.of([cases.random_layer(bias=False)] * 2)
    for gate in (
        FactorizedStack.of([cases.int8_layer(bias=False)] * 2),
        FactorizedStack.of([cases.random_layer()] * 2),
    ):
        with pytest.raises(ValueError, match="expected gate and up in the same dtypes"):
            FactorizedExperts({"gate": gate, "up": up, "down": up}, Gating(Dense()))
