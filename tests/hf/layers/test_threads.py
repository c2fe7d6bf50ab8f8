"""Products on any number of threads, from several threads at once, and on plainer processors."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

from armorfact_hf.layers.execution import PACKED
from tests.hf.layers.cases import DTYPES, random_inputs, random_layer, runs
from tests.hf.threads import computing_with

PATHS = [str(Path(__file__).parents[3] / name) for name in ("", "adapters")]


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


AT_ONCE = "from tests.hf.layers.test_threads import assert_layers_run_at_once as run; run(); print('ok')"


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
                with computing_with(count):
                    results.append(runs(layer, "packed", x))
            assert torch.equal(*results)


WITHOUT_AVX512 = """
import torch
from armorfact_hf.layers.strategies import packed as packed_strategy
from armorfact_hf.layers.kernels import simd
from tests.hf.layers.cases import assert_rounded, random_inputs, random_layer, runs
assert not simd._has_avx512()
dtype = getattr(torch, {dtype!r})
for tokens in (1, 5, 30):
    layer, x = random_layer(66, 132, (33, 12), dtype), random_inputs(tokens, 132, dtype=dtype)
    assert_rounded(layer(x), layer, x)
    packed = ["packed"] if packed_strategy.refusal(layer.kind) is None else []
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
from tests.hf.layers.cases import random_inputs, random_layer, runs
for strategy, tokens in (("packed", 1), ("packed", 30), ("unpacked", 1)):
    runs(random_layer(), strategy, random_inputs(tokens, 36))
    assert torch.get_num_threads() == 1, (strategy, tokens, torch.get_num_threads())
print("ok")
"""


def test_a_product_leaves_pytorch_its_number_of_threads():
    """numba's pool may be of the same OpenMP, whose number of threads it sets when it starts."""
    script_says_ok(ONE_THREAD, OMP_NUM_THREADS="1")
