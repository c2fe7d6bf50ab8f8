"""A digest inside of a safetensors file over all the rest of it: whatever bit flips, it shows.

`seal` puts the sha256 of the whole file, taken while 64 zeros stood in its place, into its metadata. It tells damage,
not malice.
"""

from __future__ import annotations

import hashlib
import re
from io import BufferedRandom, BufferedReader
from pathlib import Path

BLANK = {"sha256": "0" * 64}  # the metadata to save a file with that is going to be sealed
FIELD = re.compile(rb'"sha256":"([0-9a-f]{64})"')  # quotes inside of names and values are escaped: there is one of it


def seal(path: Path) -> None:
    """Write the digest into a file that was saved with the metadata `BLANK`.

    Raises:
        ValueError: it was not.
    """
    with path.open("rb+") as file:
        place, _, digest = _digest(file)
        file.seek(place)
        file.write(digest)


def check_seal(path: Path) -> None:
    """Make sure that a file is as it was sealed.

    Raises:
        ValueError: it is not, or never was sealed.
    """
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
