"""Warnings of the solver, each put into the report of the layer that it arose at."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from armorfact import DampingWarning

_notes: ContextVar[list[str] | None] = ContextVar("notes", default=None)


@contextmanager
def damping_noted() -> Iterator[None]:
    """Inside, a `DampingWarning` goes into the report of the layer that it arose at, and nowhere else.

    Warnings are the concern of a whole process, so this is entered once, around all threads that prune layers.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("always", DampingWarning)
        show = warnings.showwarning

        def note(message: Any, category: type[Warning], *where: Any, **more: Any) -> None:
            if not issubclass(category, DampingWarning):
                show(message, category, *where, **more)
            elif (notes := _notes.get()) is not None:
                notes.append(str(message))

        warnings.showwarning = note
        yield


@contextmanager
def noting(notes: list[str]) -> Iterator[None]:
    """Collect this thread's `DampingWarning`s; outside of it, as for baselines, they are dropped."""
    token = _notes.set(notes)
    try:
        yield
    finally:
        _notes.reset(token)
