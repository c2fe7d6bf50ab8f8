"""Products of Torch in the precision of their operands, whatever the process has set."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_lock = threading.Lock()
_inside = 0
_restore: Callable[[], None]


@contextmanager
def full_precision() -> Iterator[None]:
    """Inside, Torch multiplies float32 as float32, and not as TF32 or bfloat16, which many programs let it do.

    The setting is the process's, so the first thread in changes it, and the last one out puts it back.
    """
    global _inside, _restore
    with _lock:
        if not _inside:
            _restore = _set()
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if not _inside:
                _restore()


def _set() -> Callable[[], None]:
    """Set full precision; returns what puts back what was there."""
    import torch  # the array that is worked on is one of its own

    every: Any = torch.backends
    if not hasattr(every.mkldnn, "matmul"):  # before Torch 2.9
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        return lambda: torch.set_float32_matmul_precision(before)
    kept = [(backend, backend.fp32_precision) for backend in (every.cuda.matmul, every.mkldnn.matmul)]
    for backend, _ in kept:
        backend.fp32_precision = "ieee"
    return lambda: _put_back(kept)


def _put_back(kept: list[tuple[Any, str]]) -> None:
    for backend, precision in kept:
        backend.fp32_precision = precision
