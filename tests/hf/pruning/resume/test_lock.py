"""One writer at a time, whatever becomes of it."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from threading import Thread

import pytest

from armorfact_hf.pruning.resume.lock import InUse, lock, unlock

HOLD = """
import sys, time
from pathlib import Path
from armorfact_hf.pruning.resume.lock import lock
held = lock(Path(sys.argv[1]))
print("locked", flush=True)
time.sleep(60)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "journal"


@pytest.fixture
def other(folder):
    """Another process that holds the lock."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    ) as process:
        assert process.stdout.readline() == b"locked\n"
        yield process
        process.kill()


def test_the_second_writer_is_told_who_the_first_one_is(other, folder):
    who = re.escape(f"{folder} is being written by process {other.pid} on {socket.gethostname()} since 20")
    with pytest.raises(InUse, match=who + r"\d\d-.*: wait until that ends, or name another output folder"):
        lock(folder)


@pytest.mark.parametrize("content", ["", "[]", "{}", None])
def test_a_writer_that_has_not_said_who_it_is_keeps_its_lock(content, other, folder):
    if content is None:
        (folder / "writer.json").unlink()
    else:
        (folder / "writer.json").write_text(content)
    with pytest.raises(InUse, match="is being written by another process"):
        lock(folder)


def test_the_lock_vanishes_with_its_process(other, folder):
    other.kill()
    other.wait()
    assert (folder / "lock").exists()
    unlock(lock(folder))
    assert not folder.exists()


def test_a_thread_may_lock_again_and_no_other_thread_may(folder):
    first, second = lock(folder), lock(folder)
    refused = []

    def try_it() -> None:
        try:
            lock(folder)
        except InUse as error:
            refused.append(str(error))

    for held in (second, first):
        thread = Thread(target=try_it)
        thread.start()
        thread.join()
        assert f"process {os.getpid()} " in refused.pop()
        unlock(held)
    assert not folder.exists()


def test_unlocking_leaves_the_folder_where_it_holds_something(folder):
    held = lock(folder)
    (folder / "work").touch()
    unlock(held)
    assert [path.name for path in folder.iterdir()] == ["work"]
