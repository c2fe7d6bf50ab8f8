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


def settings() -> list[str]:
    """What decides over products of float32, for each backend."""
    if not hasattr(torch.backends.mkldnn, "matmul"):
        return [torch.get_float32_matmul_precision()]
    return [torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision]


@pytest.fixture(params=["highest", "high", "medium"])
def precision(request):
    torch.set_float32_matmul_precision(request.param)
    yield settings()
    torch.set_float32_matmul_precision("highest")


def full() -> bool:
    return set(settings()) <= {"ieee", "highest"}


def test_it_holds_inside_and_is_put_back(precision):
    with full_precision():
        with full_precision():
            assert full()
        assert full()
    assert settings() == precision
    with pytest.raises(ZeroDivisionError), full_precision():
        print(1 / 0)
    assert settings() == precision


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
    assert full()
    leave.set()
    thread.join()
    assert settings() == precision


def test_a_factorization_does_not_depend_on_what_the_process_has_set(precision):
    rng = np.random.default_rng(0)
    weight, inputs = rng.standard_normal((64, 64)), rng.standard_normal((64, 300)) * np.geomspace(1, 100, 64)[:, None]
    weight, gram = torch.tensor(weight).float(), torch.tensor(inputs @ inputs.T).float()
    found, product = factorize(weight, gram, block=16, max_sweeps=3), weight @ gram
    torch.set_float32_matmul_precision("highest")
    if full() and precision != settings() and torch.equal(product, weight @ gram):
        pytest.skip("this processor multiplies float32 in one way alone")
    assert torch.equal(found.dense(), factorize(weight, gram, block=16, max_sweeps=3).dense())


@pytest.mark.parametrize("before", [("none", "none"), ("tf32", "none"), ("tf32", "bf16")])
def test_settings_of_single_backends_are_put_back(before):
    """In a process of its own: Torch lets no process go back from this way of setting it."""
    code = f"""
import torch
from armorfact.arrays.precision import full_precision
backends = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
for backend, precision in zip(backends, {before}):
    backend.fp32_precision = precision
with full_precision():
    assert [backend.fp32_precision for backend in backends] == ["ieee", "ieee"]
assert [backend.fp32_precision for backend in backends] == {list(before)}
"""
    if not hasattr(torch.backends.mkldnn, "matmul"):
        pytest.skip("this Torch knows one setting alone")
    subprocess.run([sys.executable, "-c", code], check=True)
