"""Safetensors files with a digest inside over all the rest of them: whatever bit flips, it shows.

The sha256 of the whole file, taken while 64 zeros stood in its place, is in its metadata. It tells damage, not malice.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import BufferedRandom, BufferedReader
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from armorfact_hf.checkpoint.damage import without_way_out
from armorfact_hf.files import room_for, written_beside

DAMAGE = (SafetensorError, OSError, LookupError, TypeError, AttributeError, RuntimeError, ArithmeticError, ValueError)
BLANK = {"sha256": "0" * 64}
FIELD = re.compile(rb'"sha256":"([0-9a-f]{64})"')  # quotes inside of names and values are escaped: there is one of it


def save_sealed(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """Write tensors, beside their place and then renamed: a file that is there is whole.

    Raises:
        DiskFull: the disk has no room for them; what was there before is kept.
    """
    with room_for(path, sum(tensor.nbytes for tensor in tensors.values())), written_beside(path) as draft:
        save_file(dict(tensors), draft, metadata={**metadata, **BLANK})
        with draft.open("rb+") as file:
            place, _, digest = _digest(file)
            file.seek(place)
            file.write(digest)


@contextmanager
def open_sealed(path: Path, way_out: str) -> Iterator[Any]:
    """A file that `save_sealed` wrote, to read from.

    Args:
        path: the file. way_out: what happens once it is deleted, in words.

    Raises:
        ValueError: it is damaged; whatever else goes wrong inside of the context ends so as well.
    """
    try:
        _check_seal(path)
        with safe_open(path, "pt") as stored:
            yield stored
    except DAMAGE as error:
        raise ValueError(
            f"{path} is damaged ({without_way_out(error)}); delete that one file, and {way_out}"
        ) from error


def _check_seal(path: Path) -> None:
    with path.open("rb") as file:
        _, found, digest = _digest(file)
    if found != digest:
        raise ValueError("its sha256 differs")


def _digest(file: BufferedRandom | BufferedReader) -> tuple[int, bytes, bytes]:
    """Where the digest stands, what stands there, and what should."""
    head = file.read(8)
    head += file.read(min(int.from_bytes(head, "little"), _size(file)))
    found = FIELD.search(head)
    if found is None:
        raise ValueError("it holds no sha256")
    whole = hashlib.sha256(head[: found.start(1)] + BLANK["sha256"].encode() + head[found.end(1) :])
    hashlib.file_digest(file, lambda: whole)  # goes on after the head
    return found.start(1), found[1], whole.hexdigest().encode()


def _size(file: BufferedRandom | BufferedReader) -> int:
    here = file.tell()
    size = file.seek(0, 2)
    file.seek(here)
    return size
