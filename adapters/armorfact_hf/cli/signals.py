"""Ctrl-C, SIGTERM and SIGHUP end a command alike: it cleans up, and one sentence says how to go on."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
GRACE = 3.0  # seconds in which more of them do not disturb the cleaning up


class Stopped(BaseException):
    """A signal asks the program to end; not a KeyboardInterrupt, of which command line libraries speak themselves."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@contextmanager
def ended_by_signals(sentence: str) -> Iterator[None]:
    """While the block runs, a signal ends the process: by `Stopped`, then with the sentence on standard error.

    The exit status is 128 and the number of the signal, as of a process without a handler in a shell. A signal that is
    ignored already, as by `nohup`, stays so. Threads that still compute are not waited for.
    """
    first = -GRACE

    def stop(number: int, _: object) -> None:
        nonlocal first
        if time.monotonic() - first >= GRACE:  # again later: where the first was lost in a callback from C, say
            first = time.monotonic()
            raise Stopped(number)

    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        for number, handler in before.items():
            if handler is not signal.SIG_IGN:
                signal.signal(number, stop)
        yield
    except Stopped as stopped:
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        _end(sentence, 128 + stopped.number)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(sentence: str, status: int) -> None:
    with suppress(OSError, ValueError):  # a terminal that hung up
        sys.stdout.flush()
        print(sentence, file=sys.stderr, flush=True)
    os._exit(status)
