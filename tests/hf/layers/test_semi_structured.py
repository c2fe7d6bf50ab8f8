"""The sparse tensor core strategy: orientation, padding and refusals on any machine, the product itself on a GPU.

On a CPU cuSPARSELt's operators are replaced by stand-ins that store what PyTorch's own 2:4 conversion stores, and that
read memory as the real ones do, by sizes alone. They say nothing about speed, nor about cuSPARSELt's own layout.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.sparse._semi_structured_conversions import (
    _calculate_meta_reordering_scatter_offsets,
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)
from torch.sparse.semi_structured import SparseSemiStructuredTensorCUSPARSELT

from armorfact import Core, Pattern
from armorfact_hf.layers.execution import Execution
from armorfact_hf.layers.kernels import cusparselt
from armorfact_hf.layers.kernels.cusparselt import DTYPES, Algorithm, compress, product, refusal, search
from armorfact_hf.layers.linear import FactorizedLinear
from armorfact_hf.layers.strategies.strategy import PAIR, Kind

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
# The sizes that PyTorch's conversion takes: rows by 32, and columns, which it does not check itself, by 32 as well.
SHAPES = st.tuples(st.sampled_from([32, 64, 96]), st.sampled_from([32, 64, 96, 224]))


def random_core(
    d_out: int, d_in: int, dtype: torch.dtype, seed: int = 0, missing: float = 0.2, device: str = "cpu"
) -> Core:
    """A 2:4 core; each value is zero with the probability `missing`, so that groups may hold 0, 1 or 2 of them."""
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randn(d_out, d_in, generator=generator)
    dense = torch.where(PAIR.top_mask(dense.abs()), dense, 0)
    dense = torch.where(torch.rand(d_out, d_in, generator=generator) < missing, 0, dense)
    return Core.from_dense(dense.to(dtype).to(device), PAIR)


def kind(d_out: int, d_in: int, dtype: torch.dtype, device: str, pattern: Pattern = PAIR) -> Kind:
    return Kind((d_out, d_in), pattern, dtype, torch.device(device))


def random_inputs(tokens: int, d_in: int, dtype: torch.dtype, device: str = "cpu") -> Tensor:
    return torch.randn(tokens, d_in, generator=torch.Generator().manual_seed(1)).to(dtype).to(device)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.view(torch.int16), b.view(torch.int16))


def metadata(core: Core) -> Tensor:
    """PyTorch's metadata, of our packed positions: four groups of four bits in 16, in another order of the words."""
    words = core.packed.view(torch.int16)
    offsets = _calculate_meta_reordering_scatter_offsets(*words.shape, words.dtype, words.device)
    return torch.empty_like(words).view(-1).scatter_(0, offsets, words.reshape(-1)).view(words.shape)


# What we store, and what PyTorch stores


@given(shape=SHAPES, dtype=st.sampled_from(DTYPES), seed=st.integers(0, 1000))
def test_full_groups_are_packed_as_pytorch_packs_them(shape, dtype, seed):
    core = random_core(*shape, dtype, seed, missing=0)
    values, meta = sparse_semi_structured_from_dense_cutlass(core.dense())
    assert same_bits(core.values, values)
    assert torch.equal(metadata(core), meta)


@given(
    shape=SHAPES, dtype=st.sampled_from(DTYPES), seed=st.integers(0, 1000), missing=st.sampled_from([0, 0.3, 0.9, 1])
)
def test_pytorch_reads_our_positions_and_its_own_to_the_same_dense_core(shape, dtype, seed, missing):
    core = random_core(*shape, dtype, seed, missing)
    dense = core.dense()
    assert same_bits(sparse_semi_structured_to_dense_cutlass(core.values, metadata(core)), dense)
    assert same_bits(sparse_semi_structured_to_dense_cutlass(*sparse_semi_structured_from_dense_cutlass(dense)), dense)


def test_every_support_of_a_group_has_the_code_that_pytorch_gives_it():
    rows = torch.zeros(32, 32, dtype=torch.float16)
    for k, support in enumerate(PAIR.supports):
        rows[k, list(support)] = torch.tensor([1.0, 2.0], dtype=torch.float16)
    core = Core.from_dense(rows, PAIR)
    values, _ = sparse_semi_structured_from_dense_cutlass(rows)
    assert torch.equal(core.values[: len(PAIR.supports), :2], values[: len(PAIR.supports), :2])
    codes = (core.packed[: len(PAIR.supports), 0] & 15).tolist()
    assert codes == [first | second << 2 for first, second in PAIR.supports]


def test_in_float32_the_hardware_pattern_loses_values_of_a_2_4_core():
    dense = torch.zeros(32, 32)
    dense[:, :2] = torch.tensor([1.0, 2.0])
    core = Core.from_dense(dense, PAIR)
    read = sparse_semi_structured_to_dense_cutlass(*sparse_semi_structured_from_dense_cutlass(core.dense()))
    assert not torch.equal(read, dense)
    assert "1:2" in refusal(kind(32, 32, torch.float32, "cuda"))


# What is refused


def test_the_rules_for_sizes_are_pytorchs_own():
    rules = SparseSemiStructuredTensorCUSPARSELT._DTYPE_SHAPE_CONSTRAINTS
    assert {dtype for dtype in rules if dtype.is_floating_point and dtype.itemsize > 1} == set(DTYPES)
    for dtype in DTYPES:
        assert tuple(rules[dtype]) == (*[cusparselt.CORE_MULTIPLE] * 2, *[cusparselt.TOKEN_MULTIPLE] * 2)


@pytest.mark.parametrize(
    ("d_out", "d_in", "dtype", "sentence"),
    [
        (64, 64, torch.float64, "torch.float64"),
        (64, 64, torch.int8, "torch.int8"),
        (72, 64, torch.float16, "72 x 64"),
        (64, 72, torch.bfloat16, "64 x 72"),
        (0, 64, torch.float16, "0 x 64"),
        (64, 64, torch.float16, "CUDA devices, got cpu"),
    ],
)
def test_refusals_say_what_is_wrong(d_out, d_in, dtype, sentence):
    assert sentence in refusal(kind(d_out, d_in, dtype, "cpu"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
def test_a_missing_device_is_refused():
    assert refusal(kind(64, 64, torch.float16, "cuda:0")) == "PyTorch sees no CUDA device"


@pytest.mark.parametrize(
    ("hip", "library", "capability", "sentence"),
    [
        ("6.3", True, (9, 4), "AMD"),
        (None, False, (9, 0), "built without cuSPARSELt"),
        (None, True, (7, 5), "this GPU has 7.5"),
    ],
)
def test_what_pytorch_answers_about_a_device_decides(monkeypatch, hip, library, capability, sentence):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: library)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert sentence in refusal(kind(64, 64, torch.float16, "cuda"))


def test_an_error_of_the_library_becomes_one_line():
    reason = cusparselt._library_refusal(torch.device("cpu"))
    assert "_cslt_compress" in reason and "\n" not in reason


def test_other_patterns_and_refused_devices_are_errors():
    with pytest.raises(ValueError, match="got 1:4"):
        compress(Core.from_dense(torch.zeros(32, 32, dtype=torch.float16), Pattern(1, 4)))
    with pytest.raises(ValueError, match="got cpu"):
        compress(random_core(32, 32, torch.float16))


# Orientation, padding, layout


def stand_in_compress(dense: Tensor) -> Tensor:
    """Values and then metadata, in one long row as PyTorch's first releases had it."""
    assert dense.is_contiguous()
    values, meta = sparse_semi_structured_from_dense_cutlass(dense)
    return torch.cat([values.reshape(-1), meta.reshape(-1).view(dense.dtype)])


class StandIn:
    """`torch._cslt_sparse_mm` in plain PyTorch; it keeps what it was called with."""

    def __init__(self) -> None:
        self.calls: list[dict] = []

    def __call__(self, compressed: Tensor, dense: Tensor, *, transpose_result: bool, **algorithm) -> Tensor:
        self.calls.append({"tokens": dense.shape[1], "input": dense.data_ptr(), **algorithm})
        d_out, (d_in, tokens) = compressed.shape[0], dense.shape
        assert tokens % 8 == 0 and tokens > 0 and transpose_result
        kept = d_out * d_in // 2
        flat = compressed.reshape(-1)
        values, meta = flat[:kept].view(d_out, -1), flat[kept:].view(torch.int16).view(d_out, -1)
        core = sparse_semi_structured_to_dense_cutlass(values.contiguous(), meta.contiguous())
        # As cuSPARSELt sees it: where the memory begins, and the two sizes.
        read = dense if dense.is_contiguous() else dense.as_strided((tokens, d_in), (d_in, 1)).t()
        return (core.float() @ read.float()).t().to(dense.dtype).contiguous()


@pytest.fixture
def operator(monkeypatch) -> StandIn:
    stand_in = StandIn()
    monkeypatch.setattr(torch, "_cslt_compress", stand_in_compress)
    monkeypatch.setattr(torch, "_cslt_sparse_mm", stand_in)
    monkeypatch.setattr(cusparselt, "_device_refusal", lambda device: None)
    return stand_in


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [0, 1, 7, 8, 9, 64, 129])
def test_the_product_is_that_of_the_dense_core(operator, dtype, tokens):
    core = random_core(64, 96, dtype)
    compressed = compress(core)
    assert compressed.shape == (64, 96)
    assert compressed.tensor.shape == (64, 54) and compressed.tensor.nbytes * 16 == core.dense().nbytes * 9
    x = random_inputs(tokens, 96, dtype)
    y = product(compressed, x, Algorithm())
    assert y.dtype == dtype and y.shape == (tokens, 64) and y.is_contiguous()
    torch.testing.assert_close(y, (x.float() @ core.dense().float().T).to(dtype))


def test_strided_inputs_are_laid_out_first(operator):
    core = random_core(32, 32, torch.float16)
    compressed, wide = compress(core), random_inputs(16, 64, torch.float16)
    for x in (wide[:, 32:], wide[::2, :32], wide.t()[:32, :].t()[:, :32], wide[:, :32].t().contiguous().t()[:8]):
        expected = (x.float() @ core.dense().float().T).half()
        torch.testing.assert_close(product(compressed, x, Algorithm()), expected)


def test_nothing_is_copied_where_nothing_needs_to_be(operator):
    compressed, x = compress(random_core(32, 32, torch.float16)), random_inputs(16, 32, torch.float16)
    product(compressed, x, Algorithm())
    product(compressed, x[:9], Algorithm())
    assert operator.calls[0]["input"] == x.data_ptr()
    assert operator.calls[1]["input"] != x.data_ptr() and operator.calls[1]["tokens"] == 16


@given(tokens=st.integers(0, 100))
def test_padding_adds_the_fewest_rows_of_zeros(tokens):
    x = random_inputs(tokens, 4, torch.float16)
    padded = cusparselt.padded(x)
    assert padded.is_contiguous() and 0 <= len(padded) - tokens < 8 and len(padded) % 8 == 0
    assert torch.equal(padded[:tokens], x) and not padded[tokens:].any()


def test_the_algorithm_reaches_the_operator_under_the_name_it_has_there(operator):
    compressed = compress(random_core(32, 32, torch.float16))
    product(compressed, random_inputs(8, 32, torch.float16), Algorithm(3, 2, 1))
    call = operator.calls[0]
    assert (call["alg_id"], call["split_k"], call[cusparselt.MODE_NAME]) == (3, 2, 1)
    names = {argument.name for argument in torch.ops.aten._cslt_sparse_mm.default._schema.arguments}
    assert {"transpose_result", "alg_id", "split_k", cusparselt.MODE_NAME} <= names
    assert cusparselt._mode("split_k_mode", 2) == {"split_k_mode": 2}
    assert cusparselt._mode("split_k_one_kernel", 1)["split_k_one_kernel"] is True


@pytest.mark.parametrize("extra", [(), (40,)])
def test_search_asks_in_the_layout_of_the_product(monkeypatch, operator, extra):
    asked = []

    def mm_search(tensor, dense, bias, alpha, out_dtype, transpose_result):
        asked.append((dense.shape, dense.stride(), dense.dtype, bias, alpha, out_dtype, transpose_result))
        return (5, 2, 1, *extra)

    monkeypatch.setattr(torch._C, "_cusparselt", SimpleNamespace(mm_search=mm_search), raising=False)
    compressed, state = compress(random_core(32, 32, torch.bfloat16)), torch.get_rng_state()
    assert search(compressed, 9) == Algorithm(5, 2, 1)
    assert asked == [((32, 16), (1, 32), torch.bfloat16, None, None, None, True)]
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(ValueError, match="got 0"):
        search(compressed, 0)


@pytest.mark.parametrize("x", [torch.zeros(8, 16).half(), torch.zeros(8, 32), torch.zeros(8, 32, 1).half()])
def test_inputs_that_do_not_fit_are_errors(operator, x):
    compressed = compress(random_core(32, 32, torch.float16))
    with pytest.raises(ValueError, match="expected an input"):
        product(compressed, x, Algorithm())


# The strategy


@pytest.fixture
def searched(monkeypatch) -> list[tuple]:
    """The shapes that an algorithm was searched for."""
    found: list[tuple] = []

    def search(compressed, tokens):
        found.append((compressed.shape, tokens))
        return Algorithm(3, 2, 1)

    monkeypatch.setattr(cusparselt, "search", search)
    monkeypatch.setattr(cusparselt, "_found", {})
    return found


def test_a_layer_keeps_the_compressed_core_and_runs_the_algorithm_that_was_found(operator, searched):
    core = random_core(64, 96, torch.float16)
    layers = [FactorizedLinear.of(core).use_(Execution.always("semi_structured")) for _ in range(2)]
    assert searched == [((64, 96), cusparselt.SEARCHED_TOKENS)]
    x = random_inputs(9, 96, torch.float16)
    with torch.no_grad():
        y = layers[1](x)
    assert torch.equal(y, product(compress(core), x, Algorithm(3, 2, 1)))
    assert [call["alg_id"] for call in operator.calls] == [3, 3] and len(searched) == 1
    assert layers[0].use_(None).compressed is None


def test_there_is_no_cpu_form():
    layer = FactorizedLinear.of(random_core(32, 32, torch.float16))
    with pytest.raises(ValueError, match="CUDA devices, got cpu"):
        layer.use_(Execution.always("semi_structured"))


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("d_out", "d_in"), [(4096, 4096), (1536, 576)])
def test_a_gpu_multiplies_as_with_the_dense_core(dtype, d_out, d_in):
    reason = refusal(kind(d_out, d_in, dtype, "cuda"))
    if reason is not None:
        pytest.skip(reason)
    core = random_core(d_out, d_in, dtype, device="cuda")
    compressed, dense = compress(core), core.dense().double()
    assert compressed.tensor.shape[0] == d_out
    for tokens in (1, 7, 64, 128, 513):
        x = random_inputs(tokens, d_in, dtype, "cuda")
        expected = x.double() @ dense.T
        for algorithm in (Algorithm(), search(compressed, tokens)):
            y = product(compressed, x, algorithm)
            assert y.dtype == dtype and y.shape == (tokens, d_out)
            assert (y.double() - expected).norm() <= 2 * torch.finfo(dtype).eps * expected.norm()
        layer = FactorizedLinear.of(core).use_(Execution.always("semi_structured"))
        arguments = (x, layer.values, layer.positions, *[None] * 3, layer.compressed, 2, 4, layer.execution.text)
        torch.library.opcheck(
            torch.ops.armorfact.factorized_linear.default, arguments, test_utils=("test_schema", "test_faketensor")
        )
