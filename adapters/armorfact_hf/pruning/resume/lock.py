"""One writer at a time for a folder: a lock of the operating system, which ends with its process however that ends."""

from __future__ import annotations

import json
import os
import socket
from contextlib import suppress
from datetime import datetime
from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout

from armorfact_hf.files import written_beside

LOCK, WRITER = "lock", "writer.json"


class InUse(OSError):
    """Another process, or another thread of this one, writes to the folder; the message says which."""


def lock(folder: Path) -> BaseFileLock:
    """Become the one writer of a folder, which is made if it is not there, until `unlock` or the end of the process.

    A thread that is the writer already may lock again, and then has to unlock as often.

    Raises:
        InUse: there is a writer; names its process, host and the time it began.
    """
    try:
        held = _locked(folder)
    except Timeout:
        raise InUse(
            f"{folder} is being written by {_writer(folder)}: wait until that ends, or name another output folder"
        ) from None
    try:
        if held.lock_counter == 1:
            _sign(folder / WRITER)
        return held
    except BaseException:
        unlock(held)
        raise


def unlock(held: BaseFileLock) -> None:
    """Let others write; the folder goes if nothing is left in it."""
    path = Path(held.lock_file)
    if held.lock_counter > 1:
        held.release()
        return
    for ours in (path.with_name(WRITER), path):  # while it is held: nobody then locks a file that is about to vanish
        with suppress(OSError):
            ours.unlink()
    held.release()
    with suppress(OSError):
        path.parent.rmdir()


def _locked(folder: Path) -> BaseFileLock:
    held = FileLock(folder / LOCK, is_singleton=True)
    for _ in range(10):
        folder.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):  # the writer before removed it between these two lines
            held.acquire(blocking=False)
            return held
    raise Timeout(str(folder / LOCK))


def _sign(path: Path) -> None:
    who = {"pid": os.getpid(), "host": socket.gethostname(), "since": f"{datetime.now().astimezone():%F %T %z}"}
    with written_beside(path) as draft:
        draft.write_text(json.dumps(who), encoding="utf-8")


def _writer(folder: Path) -> str:
    try:
        who = json.loads((folder / WRITER).read_text(encoding="utf-8"))
        return f"process {who['pid']} on {who['host']} since {who['since']}"
    except (OSError, ValueError, LookupError, TypeError):
        return "another process"  # which has not said so yet
