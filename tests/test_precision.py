"""Products of Torch arrays are of their own precision, and the process's settings are put back."""

from __future__ import annotations

import subprocess
import sys
import threading

import numpy as np
import pytest
import torch

from armorfact import factorize
from armorfact.arrays.precision import full_precision


@pytest.fixture(params=["highest", "high", "medium"])
def precision(request):
    torch.set_float32_matmul_precision(request.param)
    yield request.param
    torch.set_float32_matmul_precision("highest")


def test_it_holds_inside_and_is_put_back(precision):
    with full_precision():
        with full_precision():
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "highest"
    assert torch.get_float32_matmul_precision() == precision
    with pytest.raises(ZeroDivisionError), full_precision():
        print(1 / 0)
    assert torch.get_float32_matmul_precision() == precision


def test_the_last_thread_out_puts_it_back(precision):
    inside, leave = threading.Event(), threading.Event()

    def other():
        with full_precision():
            inside.set()
            leave.wait(30)

    with full_precision():
        thread = threading.Thread(target=other)
        thread.start()
        assert inside.wait(30)
    assert torch.get_float32_matmul_precision() == "highest"
    leave.set()
    thread.join()
    assert torch.get_float32_matmul_precision() == precision


def test_a_factorization_does_not_depend_on_what_the_process_has_set(precision):
    rng = np.random.default_rng(0)
    weight, inputs = rng.standard_normal((64, 64)), rng.standard_normal((64, 300)) * np.geomspace(1, 100, 64)[:, None]
    weight, gram = torch.tensor(weight).float(), torch.tensor(inputs @ inputs.T).float()
    found = factorize(weight, gram, block=16, max_sweeps=3)
    torch.set_float32_matmul_precision("highest")
    assert torch.equal(found.dense(), factorize(weight, gram, block=16, max_sweeps=3).dense())


def test_settings_of_single_backends_are_put_back():
    """In a process of its own: Torch lets no process go back from this way of setting it."""
    code = """
import torch
from armorfact.arrays.precision import full_precision
backends = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
for backend, precision in zip(backends, ("tf32", "bf16")):
    backend.fp32_precision = precision
with full_precision():
    assert [backend.fp32_precision for backend in backends] == ["ieee", "ieee"]
assert [backend.fp32_precision for backend in backends] == ["tf32", "bf16"]
"""
    if not hasattr(torch.backends.mkldnn, "matmul"):
        pytest.skip("this Torch knows one setting alone")
    subprocess.run([sys.executable, "-c", code], check=True)
