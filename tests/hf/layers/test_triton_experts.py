"""The grouped Triton launch against the experts' dense products: in Triton's interpreter, and on a GPU if any."""

from __future__ import annotations

from importlib import import_module
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from armorfact import Pattern
from armorfact_hf.layers.kernels import triton_source
from armorfact_hf.layers.kernels.triton_experts import product, tiles_of
from armorfact_hf.layers.stack import FactorizedStack
from armorfact_hf.layers.strategies import packed_experts
from armorfact_hf.layers.strategies.strategy import PAIR, Kind
from tests.hf.layers.cases import DTYPES, assert_rounded, random_inputs, random_layer
from tests.hf.layers.compiled import Compiled

pytest.importorskip("triton")

COUNTS = ([1, 0, 3], [0, 17, 1], [0, 0, 5], [70, 2, 16])


def drawn(counts, d_out, d_in, block, dtype):
    """A stack of as many experts as there are counts, the layers in it, and rows of x."""
    layers = [random_layer(d_out, d_in, block, dtype, bias=False, seed=seed) for seed in range(len(counts))]
    return FactorizedStack.of(layers), layers, random_inputs(sum(counts), d_in, dtype=dtype)


def check(y: Tensor, x: Tensor, counts, layers) -> None:
    """Each expert's rows are those of its layer."""
    assert y.is_contiguous() and y.shape == (len(x), layers[0].out_features)
    for layer, given_rows, rows in zip(layers, x.split(list(counts)), y.split(list(counts)), strict=True):
        assert_rounded(rows, layer, given_rows)


def launched(stack: FactorizedStack, x: Tensor, counts) -> Tensor:
    return product(x, counts, stack.values, stack.positions, stack.left, stack.right)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.usefixtures("interpreted")
@torch.no_grad()
def test_each_expert_on_its_own_rows(counts, dtype):
    stack, layers, x = drawn(counts, 36, 140, (12, 20), dtype)
    check(launched(stack, x, counts), x, counts, layers)


@pytest.mark.parametrize("block", [None, (72, 80), (16, 128), (64, 4)], ids=str)
@pytest.mark.usefixtures("interpreted")
@torch.no_grad()
def test_blocks_larger_and_smaller_than_a_tile(block):
    d_out, d_in = (144, 160) if block == (72, 80) else (192, 256)
    stack, layers, x = drawn([3, 0, 1], d_out, d_in, block, torch.float32)
    check(launched(stack, x, [3, 0, 1]), x, [3, 0, 1], layers)


@settings(max_examples=15, derandomize=True, deadline=None)
@given(counts=st.lists(st.integers(0, 9), min_size=1, max_size=6), groups=st.integers(1, 40), d_out=st.integers(1, 40))
@pytest.mark.usefixtures("interpreted")
@torch.no_grad()
def test_any_number_of_experts_and_rows(counts, groups, d_out):
    stack, layers, x = drawn(counts, d_out, 4 * groups, (1, 4), torch.float32)
    check(launched(stack, x, counts), x, counts, layers)


@pytest.mark.usefixtures("interpreted")
@torch.no_grad()
def test_rows_may_lie_apart():
    stack, layers, x = drawn([2, 1], 8, 32, None, torch.float32)
    wide = torch.full((3, 40), torch.nan)
    wide[:, 4:36] = x
    check(launched(stack, wide[:, 4:36], [2, 1]), x, [2, 1], layers)


@given(counts=st.lists(st.integers(0, 200), min_size=1, max_size=9), size=st.sampled_from([16, 32, 64]))
def test_tiles_cover_every_row_once(counts, size):
    found, expected = [], np.repeat(np.arange(len(counts)), counts)
    for expert, first, end in tiles_of(counts, size):
        rows = range(first, min(first + size, end))
        assert len(rows) and (expected[rows.start : end] == expert).all()
        found += rows
    assert found == list(range(sum(counts)))


@pytest.mark.usefixtures("interpreted")
@torch.no_grad()
def test_projections_side_by_side():
    """What a CUDA device is given, which has no stand-in but the launch itself."""
    counts = [2, 0, 3]
    (gate, gates, x), (up, ups, _) = (drawn(counts, d_out, 32, (4, 8), torch.float32) for d_out in (8, 12))
    stacks = [(s.values, s.positions, s.left, s.right) for s in (gate, up)]
    y = packed_experts._on_gpu(x, counts, stacks)
    check(y[:, :8].contiguous(), x, counts, gates)
    check(y[:, 8:].contiguous(), x, counts, ups)


def test_experts_on_a_gpu_run_in_one_launch(monkeypatch):
    kind = Kind((64, 64), PAIR, torch.bfloat16, torch.device("cuda"))
    monkeypatch.setattr("armorfact_hf.layers.strategies.packed.HAS_TRITON", True)
    assert packed_experts.runs(kind, [500, 12, 0]) and not packed_experts.runs(kind, [500, 13, 0])
    assert not packed_experts.runs(kind._replace(pattern=Pattern(1, 4)), [1])
    assert not packed_experts.runs(kind._replace(device=torch.device("meta")), [1])
    monkeypatch.setattr("armorfact_hf.layers.strategies.packed.HAS_TRITON", False)
    assert not packed_experts.runs(kind, [1])


@pytest.mark.usefixtures("interpreted")
def test_no_row_is_no_launch(monkeypatch):
    monkeypatch.setattr(triton_source, "_kernels", lambda: SimpleNamespace(INTERPRETED=True))
    stack, _, x = drawn([0, 0], 8, 32, (4, 8), torch.float32)
    assert launched(stack, x, [0, 0]).shape == (0, 8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"counts": [1, 2, 0]}, "expected values of 3 experts, as there are counts"),
        ({"counts": [1, 1]}, "expected 3 rows in all, as x has, got counts of 2"),
        ({"x": torch.zeros(3, 16)}, r"expected values \(8, 8\) in torch.float32"),
        ({"left": torch.zeros(2, 3, 3, 3)}, r"expected left \(2, 2, 3, 3\) in torch.float32, got \(2, 3, 3, 3\)"),
        ({"right": torch.zeros(2, 4, 8, 8).half()}, "expected right .* in torch.float16"),
        ({}, "expected tensors on a GPU, got x on the CPU"),
    ],
)
def test_other_tensors_are_refused(changes, message):
    stack, _, x = drawn([1, 2], 8, 32, (4, 8), torch.float32)
    given_tensors = {name: getattr(stack, name) for name in ("values", "positions", "left", "right")}
    with pytest.raises(ValueError, match=message):
        product(**{"x": x, "counts": [1, 2], **given_tensors, **changes})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("counts", [[1, 0], [64, 70]], ids=str)
def test_compiles_within_the_memory_of_any_recent_gpu(monkeypatch, tmp_path, counts, dtype):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernels = import_module("armorfact_hf.layers.kernels.triton_kernels")
    cores, blocks = Compiled(kernels.expert_cores), Compiled(kernels.expert_blocks)
    stand_in = SimpleNamespace(INTERPRETED=True, expert_cores=cores, expert_blocks=blocks)
    monkeypatch.setattr(triton_source, "_kernels", lambda: stand_in)
    stack, _, x = drawn(counts, 256, 256, (128, 128), dtype)
    launched(stack, x, counts)
    assert 0 < max(cores.shared, blocks.shared) <= 99 * 1024


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@torch.no_grad()
def test_on_a_gpu(dtype):
    for counts in COUNTS:
        for block in (None, (12, 20), (64, 128)):
            d_out, d_in = (192, 640) if block == (64, 128) else (36, 140)
            stack, layers, x = drawn(counts, d_out, d_in, block, dtype)
            y = launched(stack.cuda(), x.cuda(), counts)
            check(y.cpu(), x, counts, layers)
