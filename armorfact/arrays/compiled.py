"""numba's compiler, with a cache on disk that can be relied on."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba


def compiled(**options: Any) -> Callable[[Callable], Any]:
    """``numba.njit`` with these options, and its cache.

    Without one where no folder for it can be written to, as in a read-only image. And numba goes by a kernel's own file
    alone; here its cache is as old as any file beside, from which a kernel may be put together.
    """

    def compile_(function: Callable) -> Any:
        try:
            kernel = numba.njit(cache=True, **options)(function)
        except RuntimeError:  # numba finds no folder
            return numba.njit(**options)(function)
        index: Any = getattr(getattr(kernel, "_cache", None), "_cache_file", None)
        if hasattr(index, "_source_stamp"):  # no name that numba promises: without it, its own rule holds
            index._source_stamp = index._source_stamp, _digest(Path(function.__code__.co_filename).parent)
        return kernel

    return compile_


@functools.cache
def _digest(folder: Path) -> str:
    found = hashlib.sha256()
    for path in sorted(folder.glob("*.py")):
        found.update(path.read_bytes())
    return found.hexdigest()
