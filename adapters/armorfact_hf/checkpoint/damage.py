"""How damaged files are told: what is wrong, and the way out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

AGAIN = "copy or download it again"


def without_way_out(error: Exception) -> str:
    """What is wrong, where there is a nearer way out than another copy."""
    return str(error).partition(f": {AGAIN.removesuffix(' it again')}")[0]


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A safetensors file.

    Raises:
        ValueError: it is damaged, or cannot be read, here or inside of the context.
    """
    try:
        with safe_open(path, "pt") as stored:
            yield stored
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged or cannot be read ({error}): {AGAIN}") from error
