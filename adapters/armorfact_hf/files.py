"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory


@contextmanager
def written_beside(target: Path) -> Iterator[Path]:
    """A path beside ``target`` to write a file at; it takes the target's place if the block ends without error."""
    draft = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        yield draft
        with draft.open("rb+") as written:
            os.fsync(written.fileno())
        draft.replace(target)
    finally:
        draft.unlink(missing_ok=True)


@contextmanager
def written_whole(target: Path) -> Iterator[Path]:
    """A path beside ``target`` to build a file or folder at; renamed to it only if the block ends without error.

    The parent of that path is a scratch folder: what else the block leaves there is thrown away. If another process
    made ``target`` in the meantime, theirs is kept.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as workshop:
        draft = Path(workshop) / target.name
        yield draft
        if not target.exists():
            draft.rename(target)


def check_room(folder: Path, needed: int) -> None:
    """Make sure that ``needed`` bytes can be written below ``folder``, which need not exist yet.

    Raises:
        PermissionError: nothing can be written there.
        OSError: the disk has less room.
    """
    existing = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    if not existing.is_dir():
        raise NotADirectoryError(f"cannot write to {folder}: {existing} is a file; name another folder")
    try:
        with TemporaryDirectory(prefix=".armorfact-", dir=existing):
            pass
    except PermissionError as error:
        raise PermissionError(f"cannot write to {folder}: {existing} is not writable; name another folder") from error
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise OSError(
            f"{folder} needs {needed / 1e9:.2f} GB of disk, {free / 1e9:.2f} GB are free; make room or name another"
        )
