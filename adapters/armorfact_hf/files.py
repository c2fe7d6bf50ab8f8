"""Files and folders that appear whole or not at all, and disks that are full."""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from filelock import FileLock
from safetensors import SafetensorError

DRAFT = ".part"  # how names of unfinished files and folders end
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, 112}  # the last is what Windows says


class DiskFull(OSError):
    """A file could not be written for want of room; the message says which, and what it needs."""


@contextmanager
def written_beside(target: Path) -> Iterator[Path]:
    """A path beside ``target`` to write a file at; it takes the target's place if the block ends without error.

    No two writers have the same path, be they threads, or processes of one number on two hosts.
    """
    draft = target.with_name(f".{target.name}.{os.getpid()}-{secrets.token_hex(4)}{DRAFT}")
    try:
        yield draft
        with draft.open("rb+") as written:
            os.fsync(written.fileno())
        draft.replace(target)
    finally:
        draft.unlink(missing_ok=True)


@contextmanager
def one_at_a_time(target: Path) -> Iterator[None]:
    """Wait until nobody else is between reading ``target`` and replacing it, and let nobody in meanwhile."""
    place = target.with_name(f".{target.name}{DRAFT}")
    with FileLock(place):
        try:
            yield
        finally:
            with suppress(OSError):  # Windows removes no file that is open
                place.unlink()  # while it is held: whoever waits finds out and makes another


def remember(path: Path, text: str) -> None:
    """Write a file of a cache, or none where that cannot be: what it holds is found out again then."""
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_beside(path) as draft:
            draft.write_text(text, encoding="utf-8")


@contextmanager
def workshop(folder: Path, name: str) -> Iterator[Path]:
    """A path of that name in a scratch folder of its own inside of ``folder``, which is removed in the end."""
    with TemporaryDirectory(prefix=f".{name}-", suffix=DRAFT, dir=folder) as scratch:
        yield Path(scratch) / name


@contextmanager
def written_whole(target: Path) -> Iterator[Path]:
    """A path beside ``target`` to build a file or folder at; renamed to it only if the block ends without error.

    The parent of that path is a scratch folder: what else the block leaves there is thrown away. If another process
    made ``target`` in the meantime, theirs is kept.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with workshop(target.parent, target.name) as draft:
        yield draft
        if not target.exists():
            draft.rename(target)


def is_draft(path: Path) -> bool:
    """Whether `written_beside` or `workshop` began it, and a kill left it."""
    return path.name.startswith(".") and path.name.endswith(DRAFT)


def remove(path: Path) -> None:
    """Remove a file or a folder that may be gone already."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def flush(folder: Path) -> None:
    """Wait until every file of a folder is on the disk, so that losing power no longer loses one."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb+") as written:
                os.fsync(written.fileno())


@contextmanager
def room_for(target: Path, needed: int) -> Iterator[None]:
    """Say what is missing where the block runs out of room while it writes ``needed`` bytes to ``target``.

    Raises:
        DiskFull: it did, by whichever of the errors that this can show itself. OSError: it failed for another reason,
            which safetensors tells by an error of its own.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        if not _is_full(error):
            if isinstance(error, OSError):
                raise
            raise OSError(f"{target} could not be written: {error}") from error
        free = shutil.disk_usage(next(parent for parent in target.absolute().parents if parent.exists())).free
        raise DiskFull(
            f"{target} could not be written: it needs {needed / 1e6:,.1f} MB, {free / 1e6:,.1f} MB are free now; make "
            "room, and the same call continues from what is finished"
        ) from error


def _is_full(error: Exception) -> bool:
    number = getattr(error, "errno", None)
    if number is None and (found := re.search(r"os error (\d+)", str(error))):  # as safetensors writes it
        number = int(found[1])
    return number in FULL


def _bytes_below(folder: Path | None) -> int:
    """Of all files in a folder; none if there is no such."""
    found = 0
    for path in [] if folder is None else folder.rglob("*"):
        with suppress(FileNotFoundError):  # another process may be at work there, which is found out later
            found += path.stat().st_size if path.is_file() else 0
    return found


def check_room(folder: Path, needed: int, begun: Path | None = None) -> None:
    """Make sure that ``needed`` bytes can be written below ``folder``, which need not exist yet.

    Args:
        begun: a folder that may hold part of them already, from a process that was killed.

    Raises:
        PermissionError: nothing can be written there.
        OSError: the disk has less room, ``folder`` is a link to nothing, or ``begun`` is on another disk.
    """
    if folder.is_symlink() and not folder.exists():
        raise NotADirectoryError(f"cannot write to {folder}: it is a link to {folder.readlink()}, which is not there")
    existing = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    if not existing.is_dir():
        raise NotADirectoryError(f"cannot write to {folder}: {existing} is a file; name another folder")
    try:
        with TemporaryDirectory(prefix=".armorfact-", dir=existing):
            pass
    except PermissionError as error:
        raise PermissionError(f"cannot write to {folder}: {existing} is not writable; name another folder") from error
    if begun is not None and begun.exists() and begun.stat().st_dev != existing.stat().st_dev:
        raise OSError(f"{begun} is on another disk than {existing}, where {folder} is to be: name another folder")
    free = shutil.disk_usage(existing).free
    if free + _bytes_below(begun) < needed:
        raise OSError(
            f"{folder} needs {needed / 1e9:.2f} GB of disk, {free / 1e9:.2f} GB are free; make room or name another"
        )
