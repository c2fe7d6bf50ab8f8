"""The peak memory of Ray's workers, watched from the process that started them. Linux counts it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event, Thread

import psutil

from armorfact_hf.free_memory import peak_memory

EVERY = 0.05  # seconds between two looks


@contextmanager
def watched_workers() -> Iterator[dict[int, int]]:
    """The most bytes that each worker has held so far, by process; those that it maps of the object store among them.

    One that starts and ends between two looks is not seen.
    """
    found: dict[int, int] = {}
    done = Event()

    def watch() -> None:
        while not done.wait(EVERY):
            found.update(_peaks())

    watching = Thread(target=watch)
    watching.start()
    try:
        yield found
    finally:
        done.set()
        watching.join()


def _peaks() -> dict[int, int]:
    peaks = {}
    for process in psutil.Process().children(recursive=True):
        try:
            if process.cmdline()[:1] and process.cmdline()[0].startswith("ray::"):
                peaks[process.pid] = peak_memory(process.pid)
        except (psutil.Error, OSError, ValueError, IndexError):  # it has ended
            continue
    return peaks
