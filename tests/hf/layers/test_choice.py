"""Which strategy runs goes by the number of tokens, and a sparse one keeps no second copy."""

from __future__ import annotations

import copy
import pickle
from dataclasses import FrozenInstanceError

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from armorfact import Pattern
from armorfact_hf.layers.execution import (
    FEW_PACKED,
    PACKED,
    STRATEGIES,
    UNPACKED,
    Execution,
    default_execution,
    runnable,
)
from armorfact_hf.layers.linear import FactorizedLinear
from armorfact_hf.layers.strategies import dense
from armorfact_hf.layers.strategies.strategy import PAIR, Kind
from tests.hf.layers.cases import DTYPES, random_inputs, random_layer


def test_a_choice_goes_by_the_number_of_tokens():
    choice = Execution(((1, "packed"), (16, "unpacked"), (None, "dense")))
    found = [choice.at(tokens) for tokens in (0, 1, 2, 16, 17, 10**6)]
    assert found == ["packed", "packed", "unpacked", "unpacked", "dense", "dense"]
    assert choice.strategies == {"packed", "unpacked", "dense"}
    assert Execution.of([[1, "packed"], [16, "unpacked"], [None, "dense"]]) == choice
    assert Execution.parse(choice.text) == choice
    with pytest.raises(FrozenInstanceError):
        choice.choices = ()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_one_strategy_for_all(strategy):
    choice = Execution.always(strategy)
    assert {choice.at(tokens) for tokens in (0, 1, 10**9)} == choice.strategies == {strategy}


@given(
    limits=st.lists(st.integers(1, 99), unique=True, max_size=5).map(sorted),
    names=st.lists(st.sampled_from(list(STRATEGIES)), min_size=6, max_size=6),
    tokens=st.integers(0, 120),
)
def test_the_first_limit_that_holds_decides(limits, names, tokens):
    choices = list(zip([*limits, None], names, strict=False))
    wanted = next(name for limit, name in choices if limit is None or tokens <= limit)
    assert Execution.of(choices).at(tokens) == wanted


@pytest.mark.parametrize(
    "choices",
    [
        (),
        ((16, "packed"),),
        ((16, "packed"), (4, "unpacked"), (None, "dense")),
        ((4, "packed"), (4, "unpacked"), (None, "dense")),
        ((0, "packed"), (None, "dense")),
        ((-1, "packed"), (None, "dense")),
        ((1.5, "packed"), (None, "dense")),
        (("4", "packed"), (None, "dense")),
        ((None, "packed"), (None, "dense")),
    ],
)
def test_limits_that_do_not_grow_are_refused(choices):
    with pytest.raises(ValueError, match="growing numbers and None as the last"):
        Execution(choices)


def test_a_strategy_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="one of packed, unpacked, semi_structured, dense, got 'fast'"):
        Execution(((4, "packed"), (None, "fast")))


def kind(device: str, dtype: torch.dtype, pattern: Pattern = PAIR) -> Kind:
    return Kind((64, 64), pattern, dtype, torch.device(device))


def test_what_runs_where_nothing_was_measured(monkeypatch):
    assert default_execution(kind("cpu", torch.float32)) == PACKED
    for dtype in (torch.bfloat16, torch.float16):
        assert default_execution(kind("cpu", dtype)) == FEW_PACKED[16]
    for device in ("cpu", "cuda"):
        assert default_execution(kind(device, torch.float64)) == UNPACKED
        assert default_execution(kind(device, torch.float32, Pattern(4, 8))) == UNPACKED
    for there, wanted in ((True, FEW_PACKED[64]), (False, UNPACKED)):
        monkeypatch.setattr("armorfact_hf.layers.strategies.packed.HAS_TRITON", there)
        assert default_execution(kind("cuda", torch.float16)) == wanted
    assert FEW_PACKED[16] == Execution(((16, "packed"), (None, "unpacked")))


def test_where_nothing_is_refused_it_runs_and_else_it_says_why():
    assert runnable(kind("cpu", torch.float32)) == ["packed", "unpacked", "dense"]
    assert runnable(kind("cpu", torch.float32, Pattern(4, 8))) == ["unpacked", "dense"]
    assert runnable(kind("mps", torch.float32)) == ["unpacked", "dense"]
    for dtype in (torch.float32, torch.float64):
        layer = random_layer(16, 32, (8, 8), dtype)
        for name, strategy in STRATEGIES.items():
            reason = strategy.refusal(layer.kind)
            assert (reason is None) == (name in runnable(layer.kind))
            if reason is None:
                assert layer.use_(Execution.always(name)).execution == Execution.always(name)
                continue
            with pytest.raises(ValueError) as told:  # noqa: PT011
                layer.use_(Execution.always(name))
            assert str(told.value) == reason


def test_a_refused_choice_leaves_the_one_before():
    layer = random_layer().use_(Execution.always("dense"))
    with pytest.raises(ValueError, match="float32 the pattern of sparse tensor cores is 1:2"):
        layer.use_(Execution(((4, "packed"), (None, "semi_structured"))))
    assert layer.execution == Execution.always("dense") and layer.merged is not None


def tensors_of(layer: FactorizedLinear) -> list[Tensor]:
    """All that the layer holds, wherever it holds it."""
    plain = [value for value in vars(layer).values() if isinstance(value, Tensor)]
    return [*plain, *layer.parameters(), *(buffer for buffer in layer.buffers() if buffer is not None)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("strategy", [None, "packed", "unpacked"])
def test_a_sparse_layer_keeps_no_dense_copy(strategy, dtype):
    layer = random_layer(40, 192, (10, 12), dtype)
    layer.use_(Execution.always("dense"))
    assert max(tensor.numel() for tensor in tensors_of(layer)) == 40 * 192
    layer.use_(None if strategy is None else Execution.always(strategy))
    before = sum(tensor.nbytes for tensor in tensors_of(layer))
    for tokens in (1, 30):
        layer(random_inputs(tokens, 192, dtype=dtype))
    assert sum(tensor.nbytes for tensor in tensors_of(layer)) == before
    assert max(tensor.numel() for tensor in tensors_of(layer)) < 40 * 192


def test_a_weight_that_does_not_fit_leaves_no_choice(monkeypatch):
    def full(operands):
        raise MemoryError

    layer, x = random_layer(), random_inputs(3, 36)
    wanted = layer(x)
    layer.use_(Execution.always("dense"))
    monkeypatch.setattr(dense, "prepare", full)
    with pytest.raises(MemoryError):
        layer.use_(Execution.always("dense"))
    assert layer.execution is None and layer.merged is None
    assert torch.equal(layer(x), wanted)


def test_a_copy_that_a_cast_left_behind_is_not_used():
    """PEFT casts through ``.data``, of which a module is not told."""
    layer, x = random_layer(dtype=torch.bfloat16).use_(Execution.always("dense")), random_inputs(3, 36)
    for parameter in layer.parameters():
        parameter.data = parameter.data.float()
    with torch.no_grad():
        assert torch.equal(layer(x), copy.deepcopy(layer).use_(None)(x))


def test_another_thread_may_choose_meanwhile():
    layer, x = random_layer(), random_inputs(3, 36)
    layer.use_(Execution.always("dense"))
    layer.merged = None  # as in the middle of the next choice
    with torch.no_grad():
        assert torch.equal(layer(x), copy.deepcopy(layer).use_(None)(x))


def test_a_copy_for_one_kind_of_gpu_stays_there():
    layer = random_layer().use_(Execution.always("dense"))
    assert copy.deepcopy(layer).choice == layer.choice
    layer.compressed = torch.zeros(3)
    assert pickle.loads(pickle.dumps(layer)).choice == ""
