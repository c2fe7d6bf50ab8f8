"""Every way to run a pruned layer on a CPU gives the dense product, within the rounding of the layer's dtype."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from armorfact import Core, Pattern
from armorfact_hf.layers import operators as ops
from armorfact_hf.layers.execution import FEW_PACKED, PACKED, PAIR, STRATEGIES, UNPACKED, Execution, default_execution
from armorfact_hf.layers.linear import FactorizedLinear

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ON_CPU = ("packed", "unpacked", "dense")
# Around a group of four tokens, where packed changes its kernel (24), and where a panel of tokens ends (128).
TOKENS = (0, 1, 2, 3, 4, 5, 7, 24, 25, 31, 128, 129, 200)
# (d_out, d_in, block): tails of vectors (16 kept values), bytes (8 columns), panels (64 columns) and row groups (4).
SIZES = (
    (4, 4, None),
    (1, 4, (1, 4)),
    (4, 4, (4, 4)),
    (70, 68, None),
    (3, 108, (1, 108)),
    (66, 132, (33, 12)),
    (40, 192, (20, 48)),
    (7, 44, (7, 44)),
)
PATHS = [str(Path(__file__).parents[2] / name) for name in ("", "adapters")]


def random_core(d_out: int, d_in: int, pattern: Pattern, generator: torch.Generator) -> Core:
    """An N:M core; a quarter of what it could keep is zero, so that groups hold from none to N values."""
    dense = torch.randn(d_out, d_in, generator=generator)
    dense = torch.where(pattern.top_mask(torch.rand(dense.shape, generator=generator)), dense, 0)
    return Core.from_dense(torch.where(torch.rand(dense.shape, generator=generator) < 0.25, 0, dense), pattern)


def random_layer(
    d_out: int = 12,
    d_in: int = 36,
    block: tuple[int, int] | None = (6, 12),
    dtype: torch.dtype = torch.float32,
    bias: bool = True,
    pattern: Pattern = PAIR,
    seed: int = 0,
) -> FactorizedLinear:
    generator = torch.Generator().manual_seed(seed)
    layer = FactorizedLinear(d_out, d_in, pattern, block, bias)
    core = random_core(d_out, d_in, pattern, generator)
    layer.values.copy_(core.values)
    layer.positions.copy_(core.packed)
    for tensor in (layer.left, layer.right, layer.bias):
        if tensor is not None:
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
    return layer.to(dtype)


def random_inputs(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def in_float64(layer: FactorizedLinear) -> FactorizedLinear:
    return copy.deepcopy(layer).to(torch.float64)


def reference(layer: FactorizedLinear, x: Tensor) -> Tensor:
    """The dense product in float64, of the weight and bias as they are stored."""
    exact = in_float64(layer)
    return functional.linear(x.double(), exact.weight, exact.bias)


def sizes_of_terms(layer: FactorizedLinear, x: Tensor) -> Tensor:
    """|A| |C| |B| |x| + |bias|: what the rounding of each entry is relative to."""
    exact = in_float64(layer)
    for tensor in exact.parameters():
        tensor.abs_()
    return functional.linear(x.double().abs(), exact.weight, exact.bias)


def assert_rounded(y: Tensor, layer: FactorizedLinear, x: Tensor, dtype: torch.dtype | None = None) -> None:
    """y is the exact product but for at most eight roundings to the dtype and a float32 sum over a row."""
    dtype = dtype or x.dtype
    wanted = reference(layer, x)
    assert y.dtype == dtype and y.shape == wanted.shape
    terms = layer.in_features + sum(layer.block or ())
    relative = 4 * torch.finfo(dtype).eps + terms * torch.finfo(torch.float32).eps / 2
    bound = relative * sizes_of_terms(layer, x) + torch.finfo(dtype).tiny
    assert ((y.double() - wanted).abs() <= bound).all(), (y.double() - wanted).abs().max().item()


def runs(layer: FactorizedLinear, strategy: str, x: Tensor) -> Tensor:
    with torch.no_grad():
        return layer.use_(Execution.always(strategy))(x)


def packed_operator(layer: FactorizedLinear, x: Tensor) -> Tensor:
    y = torch.ops.armorfact.packed_linear(x, layer.values, layer.positions, layer.left, layer.right)
    return y if layer.bias is None else y + layer.bias


# Every strategy is the dense product


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_every_strategy_is_the_dense_product_at_every_border(size, dtype):
    for tokens in TOKENS:
        layer = random_layer(*size, dtype, bias=tokens % 2 == 0)
        x = random_inputs(tokens, size[1], dtype=dtype)
        for strategy in ON_CPU:
            assert_rounded(runs(layer, strategy, x), layer, x)


@settings(max_examples=60, derandomize=True, deadline=None)
@given(data=st.data())
def test_every_strategy_is_the_dense_product(data):
    blocks_out, blocks_in = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 5))
    block = data.draw(st.integers(1, 40)), 4 * data.draw(st.integers(1, 17))
    layer = random_layer(
        blocks_out * block[0],
        blocks_in * block[1],
        data.draw(st.sampled_from([block, None])),
        data.draw(st.sampled_from(DTYPES)),
        data.draw(st.booleans()),
        seed=data.draw(st.integers(0, 99)),
    )
    x = random_inputs(data.draw(st.integers(0, 140)), layer.in_features, dtype=layer.values.dtype)
    assert_rounded(runs(layer, data.draw(st.sampled_from(ON_CPU)), x), layer, x)


def test_a_core_of_zeros_leaves_the_bias():
    layer = random_layer()
    layer.values.zero_()
    for tokens in (1, 4, 30):
        for strategy in ON_CPU:
            y = runs(layer, strategy, random_inputs(tokens, 36))
            assert torch.equal(y, layer.bias.expand(tokens, -1))


@pytest.mark.parametrize("rows", [1, 3, 5, 64])
@pytest.mark.parametrize("block", [None, (35, 68)])
def test_rows_taken_in_pieces_make_the_same_product(rows, block, monkeypatch):
    layer, x = random_layer(70, 68, block), random_inputs(30, 68)
    whole = {strategy: runs(layer, strategy, x) for strategy in ("packed", "unpacked")}
    monkeypatch.setattr(ops, "MOST_ROWS", rows)
    monkeypatch.setattr(ops, "UNPACKED_BYTES", rows * 68 * 4)
    assert torch.equal(runs(layer, "packed", x), whole["packed"])
    assert_rounded(runs(layer, "unpacked", x), layer, x)


@pytest.mark.parametrize("tokens", [1, 5, 30])
def test_one_wrapper_alone(tokens):
    layer, x = random_layer(bias=False), random_inputs(tokens, 36)
    for kept, dropped in (("left", "right"), ("right", "left")):
        other = copy.deepcopy(layer)
        blocks = getattr(other, dropped)
        blocks.copy_(torch.eye(blocks.shape[-1]).expand_as(blocks))
        tensors = {kept: getattr(layer, kept), dropped: None}
        y = torch.ops.armorfact.packed_linear(x, layer.values, layer.positions, tensors["left"], tensors["right"])
        assert_rounded(y, other, x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extreme_values_pass_unharmed(dtype):
    """The largest, the smallest normal and subnormal numbers, and signed zeros, times one."""
    info = torch.finfo(dtype)
    numbers = torch.tensor([info.max, -info.max, info.tiny, -info.tiny, info.smallest_normal, -0.0, 1.0, -1.5])
    if dtype == torch.float16:
        numbers = torch.cat([numbers, torch.tensor([2.0**-24, -(2.0**-24), 2.0**-15])])
    numbers = numbers.to(dtype)
    dense = torch.zeros(len(numbers), 64, dtype=dtype)
    for tokens in (1, 4, 30):
        for column in (0, 3, 29, 62):
            dense.zero_()
            dense[:, column] = numbers
            layer = FactorizedLinear.of(Core.from_dense(dense, PAIR))
            x = torch.zeros(tokens, 64, dtype=dtype)
            x[:, column] = 1
            assert torch.equal(runs(layer, "packed", x), numbers.expand(tokens, -1))


# Inputs of any shape and layout

SHAPES = {
    "one row": lambda dtype: random_inputs(36, dtype=dtype),
    "a batch": lambda dtype: random_inputs(2, 3, 36, dtype=dtype),
    "four axes": lambda dtype: random_inputs(2, 1, 13, 36, dtype=dtype),
    "nothing": lambda dtype: random_inputs(0, 36, dtype=dtype),
    "an empty batch": lambda dtype: random_inputs(2, 0, 36, dtype=dtype),
    "transposed": lambda dtype: random_inputs(36, 5, dtype=dtype).T,
    "transposed, many": lambda dtype: random_inputs(36, 30, dtype=dtype).T,
    "transposed batch": lambda dtype: random_inputs(3, 2, 36, dtype=dtype).transpose(0, 1),
    "every second row": lambda dtype: random_inputs(10, 36, dtype=dtype)[::2],
    "every second column": lambda dtype: random_inputs(4, 72, dtype=dtype)[:, ::2],
    "one row expanded": lambda dtype: random_inputs(36, dtype=dtype).expand(30, 36),
    "an offset": lambda dtype: random_inputs(3, 37, dtype=dtype)[:, 1:],
}


@pytest.mark.parametrize("strategy", ON_CPU)
@pytest.mark.parametrize("shape", SHAPES)
def test_inputs_of_any_shape_and_layout(shape, strategy):
    for dtype in DTYPES:
        layer, x = random_layer(dtype=dtype), SHAPES[shape](dtype)
        before = x.clone()
        assert_rounded(runs(layer, strategy, x), layer, x)
        assert torch.equal(x, before)


def test_a_wrong_last_size_or_dtype_is_named():
    layer = random_layer()
    for shape in [(3, 35), (36, 3), (40,)]:
        with pytest.raises(ValueError, match=r"expected an input \(\.\.\., 36\), got \(" + str(shape[0])):
            layer(torch.zeros(shape))
    for dtype in (torch.float64, torch.bfloat16, torch.int64):
        with pytest.raises(ValueError, match=rf"expected an input of torch\.float32, .* got {dtype}"):
            layer(torch.zeros(3, 36, dtype=dtype))


# Patterns and dtypes that the packed product does not know


@pytest.mark.parametrize("pattern", ["4:8", "1:4", "2:8", "1:3", "1:2"])
@pytest.mark.parametrize("block", [None, (6, 24)])
def test_any_pattern_runs_unpacked_and_refuses_packed(pattern, block):
    for dtype in DTYPES:
        layer = random_layer(12, 48, block, dtype, pattern=Pattern.parse(pattern))
        for tokens in (1, 30):
            x = random_inputs(tokens, 48, dtype=dtype)
            assert_rounded(layer.use_(None)(x), layer, x)
            for strategy in ("unpacked", "dense"):
                assert_rounded(runs(layer, strategy, x), layer, x)
        with pytest.raises(ValueError, match=f"packed product is for 2:4 cores .*, got {pattern} in .*'unpacked'"):
            layer.use_(PACKED)


def test_float64_runs_and_refuses_packed():
    layer, x = random_layer(dtype=torch.float64), random_inputs(3, 36, dtype=torch.float64)
    for execution in (None, UNPACKED, Execution.always("dense")):
        y = layer.use_(execution)(x)
        torch.testing.assert_close(y, reference(layer, x), rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match=r"got 2:4 in torch\.float64: use 'unpacked'"):
        layer.use_(Execution(((1, "packed"), (None, "dense"))))


# Autocast


@pytest.mark.parametrize("strategy", ON_CPU)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_autocast_gives_what_a_linear_layer_gives(strategy, dtype, bias):
    layer = random_layer(dtype=dtype, bias=bias)
    linear = nn.Linear(36, 12, bias, dtype=dtype)
    for target in (torch.bfloat16, torch.float16):
        for given_dtype in (torch.float32, target):
            x = random_inputs(2, 5, 36, dtype=given_dtype)
            with torch.no_grad(), torch.autocast("cpu", target):
                assert linear(x).dtype == target
            with torch.autocast("cpu", target):
                y = runs(layer, strategy, x)
            coarser = torch.bfloat16 if torch.bfloat16 in (dtype, target) else target
            assert y.dtype == target
            assert_rounded(y.to(coarser), layer, x.to(target), coarser)


def test_autocast_leaves_float64_as_a_linear_layer_does():
    x = random_inputs(3, 36, dtype=torch.float64)
    layer = random_layer(dtype=torch.float64)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert nn.Linear(36, 12, dtype=torch.float64)(x).dtype == torch.float64
        y = layer(x)
    torch.testing.assert_close(y, reference(layer, x), rtol=1e-12, atol=1e-12)


def test_a_layer_without_memory_tells_the_shape_of_its_output():
    """On the meta device, where a linear layer runs too."""
    layer = FactorizedLinear(12, 36, block=(6, 12), bias=True, device="meta")
    for tokens in (1, 30):
        assert layer(torch.empty(2, tokens, 36, device="meta")).shape == (2, tokens, 12)


# Gradients


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


# Operators, compilation, threads


@pytest.mark.parametrize("tokens", [0, 1, 5, 30])
@pytest.mark.parametrize("block", [(6, 12), None])
def test_the_operators_are_what_they_say(tokens, block):
    for dtype in DTYPES:
        layer, x = random_layer(block=block, dtype=dtype), random_inputs(tokens, 36, dtype=dtype)
        held = (x, layer.values.detach(), layer.positions)
        blocks = (None, None) if block is None else (layer.left.detach(), layer.right.detach())
        for operator, arguments in (("packed_linear", (*held, *blocks)), ("unpacked_linear", (*held, 2, 4))):
            torch.library.opcheck(
                getattr(torch.ops.armorfact, operator).default,
                arguments,
                test_utils=("test_schema", "test_faketensor"),
            )


@pytest.mark.parametrize("strategy", ON_CPU)
@pytest.mark.parametrize("dynamic", [None, True])
def test_compile_sees_one_graph(strategy, dynamic):
    torch._dynamo.reset()
    layer = random_layer().use_(Execution.always(strategy))
    compiled = torch.compile(layer, fullgraph=True, backend="eager", dynamic=dynamic)
    for tokens in (1, 3, 24, 25, 130):
        x = random_inputs(2, tokens, 36)
        with torch.no_grad():
            assert torch.equal(compiled(x), layer(x))


def test_a_compiled_layer_changes_its_strategy_with_the_number_of_tokens():
    torch._dynamo.reset()
    layer = random_layer(70, 132, (35, 12)).use_(Execution(((8, "packed"), (None, "unpacked"))))
    compiled = torch.compile(layer, fullgraph=True, backend="eager", dynamic=True)
    for tokens in (6, 30, 8, 9):
        x = random_inputs(tokens, 132)
        with torch.no_grad():
            assert torch.equal(compiled(x), layer(x))
            assert torch.equal(compiled(x), packed_operator(layer, x)) == (tokens <= 8)


@contextmanager
def threads(count: int):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def script_says_ok(script: str, **environment: str) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script],
        env=os.environ | environment | {"PYTHONPATH": os.pathsep.join(PATHS)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout.split()) == (0, ["ok"]), done.stderr


def assert_layers_run_at_once() -> None:
    layers = [random_layer(64, 64, block, dtype) for block in ((16, 16), None) for dtype in DTYPES]
    for layer in layers:
        layer.use_(PACKED)
    calls = [(layer, random_inputs(n, 64, dtype=layer.values.dtype, seed=n)) for layer in layers for n in (1, 6, 40)]

    def call(number: int) -> Tensor:
        layer, x = calls[number % len(calls)]
        with torch.no_grad():
            return layer(x)

    alone = [call(number) for number in range(len(calls))]
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(call, range(20 * len(calls))))
    assert all(torch.equal(y, alone[number % len(calls)]) for number, y in enumerate(together))


AT_ONCE = "from tests.hf.layers.test_execution import assert_layers_run_at_once as run; run(); print('ok')"


def test_threads_may_call_layers_at_once():
    assert_layers_run_at_once()


def test_threads_may_call_layers_at_once_on_the_simplest_pool():
    """numba's own, which ends the process where two threads enter it."""
    script_says_ok(AT_ONCE, NUMBA_THREADING_LAYER="workqueue")


@pytest.mark.parametrize("size", [(70, 132, (35, 12)), (70, 132, None), (1, 132, None)], ids=str)
def test_the_number_of_threads_changes_no_bit(size):
    for dtype in DTYPES:
        layer = random_layer(*size, dtype)
        for tokens in (1, 5, 24, 30, 130):
            x = random_inputs(tokens, 132, dtype=dtype)
            results = []
            for count in (1, 2):
                with threads(count):
                    results.append(runs(layer, "packed", x))
            assert torch.equal(*results)


WITHOUT_AVX512 = """
import torch
from armorfact_hf.layers import execution as choice
from armorfact_hf.layers.kernels import simd
from tests.hf.layers.test_execution import assert_rounded, random_inputs, random_layer, runs
assert not simd._has_avx512()
dtype = getattr(torch, {dtype!r})
for tokens in (1, 5, 30):
    layer, x = random_layer(66, 132, (33, 12), dtype), random_inputs(tokens, 132, dtype=dtype)
    assert_rounded(layer(x), layer, x)
    packed = ["packed"] if choice.packs("cpu", dtype, choice.PAIR) else []
    assert packed or dtype == torch.float16
    for strategy in (*packed, "unpacked"):
        assert_rounded(runs(layer, strategy, x), layer, x)
print("ok")
"""


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_processor_without_avx512(dtype, tmp_path):
    """numba compiles for the plainest processor of its kind, which has no half floats either."""
    generic = {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": "", "NUMBA_CACHE_DIR": str(tmp_path)}
    script_says_ok(WITHOUT_AVX512.format(dtype=str(dtype).removeprefix("torch.")), **generic)


ONE_THREAD = """
import torch
from tests.hf.layers.test_execution import random_inputs, random_layer, runs
for strategy, tokens in (("packed", 1), ("packed", 30), ("unpacked", 1)):
    runs(random_layer(), strategy, random_inputs(tokens, 36))
    assert torch.get_num_threads() == 1, (strategy, tokens, torch.get_num_threads())
print("ok")
"""


def test_a_product_leaves_pytorch_its_number_of_threads():
    """numba's pool may be of the same OpenMP, whose number of threads it sets when it starts."""
    script_says_ok(ONE_THREAD, OMP_NUM_THREADS="1")


# The choice


def test_a_choice_goes_by_the_number_of_tokens():
    choice = Execution(((1, "packed"), (16, "unpacked"), (None, "dense")))
    found = [choice.at(tokens) for tokens in (0, 1, 2, 16, 17, 10**6)]
    assert found == ["packed", "packed", "unpacked", "unpacked", "dense", "dense"]
    assert choice.strategies == {"packed", "unpacked", "dense"}
    assert Execution.of([[1, "packed"], [16, "unpacked"], [None, "dense"]]) == choice
    with pytest.raises(FrozenInstanceError):
        choice.choices = ()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_one_strategy_for_all(strategy):
    choice = Execution.always(strategy)
    assert {choice.at(tokens) for tokens in (0, 1, 10**9)} == choice.strategies == {strategy}


@given(
    limits=st.lists(st.integers(1, 99), unique=True, max_size=5).map(sorted),
    names=st.lists(st.sampled_from(STRATEGIES), min_size=6, max_size=6),
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


def test_what_runs_where_nothing_was_measured(monkeypatch):
    assert default_execution("cpu", torch.float32, PAIR) == PACKED
    for dtype in (torch.bfloat16, torch.float16):
        assert default_execution("cpu", dtype, PAIR) == FEW_PACKED[16]
    for device in ("cpu", "cuda"):
        assert default_execution(device, torch.float64, PAIR) == UNPACKED
        assert default_execution(device, torch.float32, Pattern(4, 8)) == UNPACKED
    for there, wanted in ((True, FEW_PACKED[64]), (False, UNPACKED)):
        monkeypatch.setattr("armorfact_hf.layers.execution.HAS_TRITON", there)
        assert default_execution("cuda", torch.float16, PAIR) == wanted
    assert FEW_PACKED[16] == Execution(((16, "packed"), (None, "unpacked")))


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
