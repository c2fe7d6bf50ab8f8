"""A part in a process of its own: a kernel that faults loses the device for its process, and one may never end."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

from benchmarks.gpu.parts import measured
from benchmarks.gpu.report import FAILED, STOPPED, Figure
from benchmarks.gpu.setup import Setup

ENDING = 10  # seconds that a process with no more to say may take to end


def isolated(name: str, setup: Setup, seconds: float) -> Iterator[Figure]:
    """The figures of a part, each as soon as it is there; the process is killed after so many seconds."""
    deadline = time.monotonic() + seconds
    context = get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_send, args=(name, setup, sender))
    child.start()
    sender.close()
    try:
        while receiver.poll(max(0.0, deadline - time.monotonic())):
            try:
                yield receiver.recv()
            except EOFError:
                break
        else:
            yield Figure(name, {}, {}, STOPPED, f"at its limit of {seconds:.0f} s")
            return
        child.join(ENDING)
        if child.exitcode:
            yield Figure(name, {}, {}, FAILED, f"its process ended with code {child.exitcode}")
    finally:
        _end(child)


def _send(name: str, setup: Setup, sender: Connection) -> None:
    os.setsid()  # what it starts is ended with it
    for figure in measured(name, setup):
        sender.send(figure)


def _end(child: BaseProcess) -> None:
    if child.pid is not None and child.exitcode is None:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.kill()
        child.join()
