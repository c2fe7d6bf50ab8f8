"""The Triton kernels against the dense product in float64: in Triton's interpreter on the CPU, and on a GPU if any."""

from __future__ import annotations

import itertools
import sys
from dataclasses import replace
from importlib import import_module
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from armorfact import Core, Pattern
from armorfact_hf.layers.kernels import triton_packed, triton_source
from armorfact_hf.layers.kernels.triton_packed import fuses_right, packed_product, tiling
from tests.hf.layers.compiled import Compiled

pytest.importorskip("triton")

KERNELS = "armorfact_hf.layers.kernels.triton_kernels"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TOKENS = (1, 2, 3, 7, 16, 17, 64, 65)


def drawn(seed: int, tokens: int, d_out: int, d_in: int, block: int | None, dtype: torch.dtype):
    """Random x, core and blocks of B; a tenth of the groups is zero."""
    rng = np.random.default_rng(seed)
    matrix = rng.standard_normal((d_out, d_in // 4, 4)) * (rng.random((d_out, d_in // 4, 1)) > 0.1)
    matrix *= rng.random(matrix.shape).argsort(axis=-1) < 2
    core = Core.from_dense(torch.tensor(matrix.reshape(d_out, d_in)).to(dtype), Pattern(2, 4))
    x = torch.tensor(rng.standard_normal((tokens, d_in))).to(dtype)
    if block is None:
        return x, core, None
    blocks = rng.standard_normal((d_in // block, block, block)) / np.sqrt(block)
    return x, core, torch.tensor(blocks).to(dtype)


def product(x: Tensor, core: Core, right: Tensor | None = None) -> Tensor:
    return packed_product(x, core.values, core.packed, right)


def check(y: Tensor, x: Tensor, core: Core, right: Tensor | None = None) -> None:
    """Entry (t, i) is off by at most 1.5 roundings of the sum of its absolute terms: one for B x, half a one for y."""
    z, terms = x.double(), x.double().abs()
    if right is not None:
        blocks = torch.block_diag(*right.double())
        z, terms = z @ blocks.T, terms @ blocks.T.abs()
    dense = core.dense().double()
    error, terms = (y.double() - z @ dense.T).abs(), terms @ dense.T.abs()
    assert y.shape == error.shape and y.dtype == x.dtype and y.is_contiguous()
    assert bool((error <= 1.5 * torch.finfo(x.dtype).eps * terms).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.usefixtures("interpreted")
def test_equals_the_dense_product_with_tails_of_every_tile(tokens, dtype):
    x, core, _ = drawn(tokens, tokens, 37, 404, None, dtype)
    check(product(x, core), x, core)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "block"), [(1, None), (1, 16), (7, None), (65, 16)])
@pytest.mark.usefixtures("interpreted")
def test_kept_values_in_int8(tokens, block, dtype):
    x, core, right = drawn(tokens, tokens, 37, 400, block, dtype)
    whole = replace(core, values=(core.values.float() * 40).round().clamp(-127, 127).to(torch.int8))
    check(product(x, whole, right), x, whole, right)


@pytest.mark.usefixtures("interpreted")
def test_one_token_over_more_groups_and_rows_than_a_tile():
    out, groups = triton_packed.ONE_TOKEN_TILE
    x, core, _ = drawn(0, 1, 2 * out + 1, 4 * (groups + 3), None, torch.float16)
    check(product(x, core), x, core)


@pytest.mark.parametrize(("tokens", "d_out"), [(0, 5), (3, 0), (0, 0)])
@pytest.mark.usefixtures("interpreted")
def test_nothing_is_launched_for_an_empty_product(monkeypatch, tokens, d_out):
    monkeypatch.setattr(triton_source, "_kernels", lambda: SimpleNamespace(INTERPRETED=True))
    x, core, right = drawn(0, tokens, max(d_out, 1), 32, 16, torch.float16)
    y = packed_product(x, core.values[:d_out], core.packed[:d_out], right)
    assert y.shape == (tokens, d_out) and y.dtype == torch.float16


@pytest.mark.parametrize("tokens", [1, 7, 64])
@pytest.mark.parametrize(
    ("dtype", "block"),
    [*((dtype, block) for dtype in DTYPES for block in (16, 64)), (torch.float16, 128), (torch.bfloat16, 128)],
    ids=str,
)
@pytest.mark.usefixtures("interpreted")
def test_fused_and_unfused_are_the_same(monkeypatch, tokens, dtype, block):
    assert fuses_right(tokens, 33, block, dtype.itemsize)
    x, core, right = drawn(tokens, tokens, 33, 3 * block, block, dtype)
    with monkeypatch.context() as patch:
        patch.delattr(triton_packed, "block_product")
        check(product(x, core, right), x, core, right)
    monkeypatch.setattr(triton_packed, "fuses_right", lambda *sizes: False)
    check(product(x, core, right), x, core, right)


@settings(max_examples=40, derandomize=True, deadline=None)
@given(data=st.data(), dtype=st.sampled_from(DTYPES))
@pytest.mark.usefixtures("interpreted")
def test_any_shape_and_any_block_that_divides_d_in(data, dtype):
    d_out, groups, tokens = (data.draw(st.integers(1, most)) for most in (70, 140, 20))
    block = data.draw(st.sampled_from([None, *(size for size in range(1, 65) if 4 * groups % size == 0)]))
    x, core, right = drawn(data.draw(st.integers(0, 99)), tokens, d_out, 4 * groups, block, dtype)
    check(product(x, core, right), x, core, right)


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("block", [None, 12, 16])
@pytest.mark.usefixtures("interpreted")
def test_strides_of_x_do_not_matter(tokens, block):
    x, core, right = drawn(1, tokens, 9, 48, block, torch.float32)
    wide, tall = torch.full((tokens, 100), torch.nan), torch.full((48, 2 * tokens), torch.nan)
    wide[:, 3:51], tall[:, ::2] = x, x.T
    one = x[:1].expand(4, -1)
    for view in (wide[:, 3:51], tall[:, ::2].T, one):
        check(product(view, core, right), view.contiguous(), core, right)


@pytest.mark.usefixtures("interpreted")
def test_values_and_positions_may_be_slices():
    x, core, _ = drawn(2, 3, 12, 64, None, torch.float32)
    y = packed_product(x, core.values[::2], core.packed[::2])
    assert torch.equal(y, product(x, core)[:, ::2])


@pytest.mark.usefixtures("interpreted")
def test_bits_of_the_half_used_last_byte_are_ignored():
    x, core, _ = drawn(3, 2, 6, 20, None, torch.float32)
    packed = core.packed.clone()
    packed[:, -1] |= 0xF0
    for rows in (x, x[:1]):
        assert torch.equal(packed_product(rows, core.values, packed), product(rows, core))


@pytest.mark.usefixtures("interpreted")
def test_partial_sums_do_not_change_what_is_computed(monkeypatch):
    x, core, right = drawn(4, 3, 40, 1024, 32, torch.float16)
    for programs, parts in ((1, 1), (6, 3), (264, 8)):
        monkeypatch.setattr(triton_packed, "PROGRAMS", programs)
        assert tiling(3, 40, 256, 2).parts == parts
        y = product(x, core, right)
        check(y, x, core, right)
        assert torch.equal(y, product(x, core, right))


@given(
    tokens=st.integers(1, 5000),
    d_out=st.integers(1, 20000),
    groups=st.integers(1, 5000),
    size=st.sampled_from([2, 4]),
    block=st.sampled_from([None, 16, 64]),
)
def test_tiles_cover_every_group_once_and_no_part_is_empty(tokens, d_out, groups, size, block):
    cut = tiling(tokens, d_out, groups, size, block)
    assert cut.groups_a_part % cut.groups == 0
    assert (cut.parts - 1) * cut.groups_a_part < groups <= cut.parts * cut.groups_a_part
    assert cut.out >= cut.tokens >= min(tokens, 64) and (block is None or 4 * cut.groups == block)


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ((8, 256, 128, 2), True),
        ((8, 257, 128, 2), False),  # a ninth tile of rows
        ((64, 512, 128, 2), True),
        ((65, 64, 128, 2), False),
        ((8, 256, 128, 4), False),
        ((8, 256, 8, 2), False),
        ((8, 256, 48, 2), False),
    ],
)
def test_where_the_right_wrapper_is_fused(sizes, expected):
    assert fuses_right(*sizes) is expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(2, 3, 8)}, r"expected x \(tokens, d_in\)"),
        ({"x": torch.zeros(2, 6)}, "d_in a multiple of 4"),
        ({"x": torch.zeros(2, 8, dtype=torch.float64)}, "float16, bfloat16 or float32"),
        ({"values": torch.zeros(3, 8)}, r"expected values \(3, 4\) in torch.float32, got \(3, 8\)"),
        ({"values": torch.zeros(3, 4).half()}, "expected values .* got .* in torch.float16"),
        ({"positions": torch.zeros(3, 1)}, r"expected positions \(3, 1\) in torch.uint8"),
        ({"right": torch.zeros(2, 3, 3)}, "expected blocks whose size divides d_in = 8, got 3"),
        ({"right": torch.zeros(8, 8)}, r"expected right \(1, 8, 8\)"),
        ({}, r"expected tensors on a GPU, got x on the CPU"),
    ],
)
def test_other_tensors_are_refused(changes, message):
    given = {"x": torch.zeros(2, 8), "values": torch.zeros(3, 4), "positions": torch.zeros(3, 1, dtype=torch.uint8)}
    with pytest.raises(ValueError, match=message):
        packed_product(**{**given, **changes})


def test_without_triton_the_error_names_the_way_out(monkeypatch):
    monkeypatch.delitem(sys.modules, KERNELS, raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)
    x, core, _ = drawn(0, 2, 3, 8, None, torch.float32)
    with pytest.raises(ImportError, match="pip install triton"):
        product(x, core)


@pytest.mark.parametrize(
    ("tokens", "block", "dtype"),
    [
        (1, None, torch.bfloat16),
        (16, None, torch.bfloat16),
        (64, None, torch.float16),
        (64, None, torch.float32),
        (64, 128, torch.float16),
        (1, 32, torch.float32),
    ],
)
def test_compiles_within_the_memory_of_any_recent_gpu(monkeypatch, tmp_path, tokens, block, dtype):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernels = import_module(KERNELS)
    one, some = Compiled(kernels.one_token), Compiled(kernels.some_tokens)
    stand_in = SimpleNamespace(INTERPRETED=True, one_token=one, some_tokens=some)
    monkeypatch.setattr(triton_source, "_kernels", lambda: stand_in)
    x, core, right = drawn(0, tokens, 33, 512, block, dtype)
    product(x, core, right)
    assert 0 < max(one.shared, some.shared) <= 99 * 1024
    product(x, replace(core, values=core.values.to(torch.int8)), right)
    assert 0 < max(one.shared, some.shared) <= 99 * 1024


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_on_a_gpu(dtype):
    for d_out, block, tokens in itertools.product((33, 1000), (None, 12, 32, 64, 128), TOKENS):
        d_in = 3 * 1028 if block in (None, 12) else 9 * block
        x, core, right = drawn(tokens, tokens, d_out, d_in, block, dtype)
        moved = [None if tensor is None else tensor.cuda() for tensor in (x, core.values, core.packed, right)]
        check(packed_product(*moved).cpu(), x, core, right)
