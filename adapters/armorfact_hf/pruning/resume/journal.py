"""The finished work of a run, on disk: what a killed run resumes from.

A folder holds one `Entry` for each finished decoder block, one for each finished layer of a block that is at work, and
a manifest, which says what the run is about. One process writes at a time.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from filelock import BaseFileLock

from armorfact import Pattern
from armorfact_hf.files import is_draft, remove
from armorfact_hf.pruning.resume.entry import Entry, Finished
from armorfact_hf.pruning.resume.lock import LOCK, WRITER, InUse, lock, unlock
from armorfact_hf.pruning.resume.manifest import (
    MANIFEST,
    check_same,
    digest_of,
    read_manifest,
    refuse_foreign,
    write_manifest,
)

LAYER = re.compile(r"([a-z]+-\d{4,})-layer-\d{4,}")  # the key of a layer, and in it that of its decoder block
PRICES = "prices"
KEY = re.compile(rf"{PRICES}|head|tail|state|[a-z]+-\d{{4,}}|{LAYER.pattern}")
SUFFIX = ".safetensors"


@dataclass(frozen=True)
class Journal:
    """The folder of one run, of which this process is the only writer until the journal is closed.

    Args:
        folder: holds the manifest and the entries.
        pattern: the N:M pattern of the run.
        run: the digest of the manifest.
        held: the lock.
    """

    folder: Path
    pattern: Pattern
    run: str
    held: BaseFileLock

    @classmethod
    def open(cls, folder: Path, manifest: Mapping[str, Any], pattern: str | Pattern) -> Journal:
        """Start a journal in ``folder``, or continue the one that is there.

        Leave it with `close`, or as a context manager.

        Raises:
            DifferentRun: the folder belongs to a run with another manifest, or is none of armorfact's.
            InUse: another process is at it.
        """
        refuse_foreign(folder, "journal of armorfact")
        held = lock(folder)
        try:
            _begin(folder, manifest)
            return cls(folder, Pattern.parse(pattern), digest_of(manifest), held)
        except BaseException:
            unlock(held)
            raise

    def close(self) -> None:
        """Let others continue."""
        unlock(self.held)

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def remove(self) -> None:
        """Remove all of the journal but its lock, which `close` takes away with the folder.

        The manifest goes last, so that whatever a kill leaves is known as a journal.
        """
        _clear(self.folder)

    def write(self, key: str, finished: Finished) -> None:
        """Store finished work; that of a decoder block takes the place of its single layers.

        Args:
            key: "prices", "head", "tail", a word and a number such as "block-0003", or a `layer_key`.

        Raises:
            DiskFull: the disk has no room for it.
        """
        self._entry(key).write(finished)
        if not LAYER.fullmatch(key):
            for path in _layers_of(self.folder, key):
                remove(path)

    def read(self, key: str, device: Any = None) -> Finished | None:
        """What is stored under ``key``, or None.

        Raises:
            ValueError: the file is damaged, or another than what was written under this key in this run.
        """
        return self._entry(key).read(device)

    def layers_of(self, key: str, device: Any = None) -> list[Finished]:
        """The single layers of a decoder block that were stored, in order.

        Raises:
            ValueError: see `read`.
        """
        found = [self.read(path.stem, device) for path in _layers_of(self.folder, key)]
        return [layer for layer in found if layer is not None]

    def tensors(self) -> dict[str, Path]:
        """The file of every tensor of the finished layers, by name; what was tuned last counts.

        Raises:
            ValueError: see `read`.
        """
        found: dict[str, Path] = {}
        for path in filter(_is_entry, sorted(_held(self.folder))):  # a tail after blocks
            found |= dict.fromkeys(self._entry(path.stem).names(), path)
        return found

    def _entry(self, key: str) -> Entry:
        again = "its layer is pruned" if LAYER.fullmatch(key) else "its decoder block is pruned"
        again = "prices are found" if key == PRICES else again
        return Entry(self.folder / f"{key}{SUFFIX}", self.run, self.pattern, again)


@contextmanager
def only_writer(folder: Path) -> Iterator[Path]:
    """Hold the lock of a folder, without the drafts that kills left there.

    Raises:
        DifferentRun: it holds something else than a journal. InUse: see `lock`.
    """
    refuse_foreign(folder, "journal of armorfact")
    held = lock(folder)
    try:
        for path in filter(is_draft, folder.iterdir()):
            remove(path)
        yield folder
    finally:
        unlock(held)


def layer_key(block: str, place: int) -> str:
    """The key of a single layer.

    Args:
        block: the key of its decoder block. place: its place among the layers of that.
    """
    return f"{block}-layer-{place:04}"


def remove_leftover(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Remove the journal of a run that is finished; one of another run, in use, or with foreign files is left alone."""
    if folder.is_dir() and all(map(_is_ours, _held(folder))) and _is_of(folder, manifest):
        with suppress(InUse):
            held = lock(folder)
            _clear(folder)
            unlock(held)


def _is_of(folder: Path, manifest: Mapping[str, Any]) -> bool:
    """Whether a journal is of a run; one without a manifest is of none, and as good as empty."""
    try:
        return not (folder / MANIFEST).exists() or read_manifest(folder) == manifest
    except ValueError:
        return False


def _begin(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Make the folder one of this run, without what kills left in it."""
    if (folder / MANIFEST).exists():
        check_same(read_manifest(folder), manifest, folder)
        for path in _held(folder):
            if is_draft(path) or _is_superseded(path):
                remove(path)
    else:
        _clear(folder)
        write_manifest(folder, manifest)


def _clear(folder: Path) -> None:
    """Remove what is ours, the manifest last; for the writer."""
    for path in _held(folder):
        if _is_ours(path) and path.name not in (MANIFEST, LOCK, WRITER):
            remove(path)
    remove(folder / MANIFEST)


def _held(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except FileNotFoundError:
        return []


def _layers_of(folder: Path, key: str) -> list[Path]:
    return sorted(path for path in _held(folder) if _is_entry(path) and _block_of(path) == key)


def _block_of(path: Path) -> str | None:
    """The key of the decoder block that an entry is a single layer of."""
    found = LAYER.fullmatch(path.stem)
    return found and found[1]


def _is_superseded(path: Path) -> bool:
    """Whether an entry is a single layer of a finished decoder block."""
    block = _block_of(path)
    return block is not None and path.with_name(f"{block}{SUFFIX}").exists()


def _is_entry(path: Path) -> bool:
    return path.suffix == SUFFIX and KEY.fullmatch(path.stem) is not None


def _is_ours(path: Path) -> bool:
    """Entries are where there is a manifest: it is written before them, and removed after them."""
    ours = path.name in (MANIFEST, LOCK, WRITER) or is_draft(path)
    return ours or (_is_entry(path) and path.with_name(MANIFEST).exists())
