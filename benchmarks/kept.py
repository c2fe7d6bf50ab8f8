"""Figures that take long are kept, in a file for each, and found again by all that they depend on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from armorfact_hf.files import written_beside

# Raised with every change of the pruning itself that moves figures: what was kept before is then measured anew.
GENERATION = 2


def kept(out: Path, name: str, key: object, found: Callable[[], Any]) -> Any:
    """What stands in a file of ``out`` under a name and a key of JSON types, found out first where there is none."""
    path = place_of(out, name, key)
    if not path.exists():
        figures = found()
        out.mkdir(parents=True, exist_ok=True)
        with written_beside(path) as draft:
            draft.write_text(json.dumps(figures), encoding="utf-8")
    return json.loads(path.read_text(encoding="utf-8"))


def place_of(out: Path, name: str, key: object) -> Path:
    """The file of `kept`."""
    digest = hashlib.sha256(json.dumps([GENERATION, key], sort_keys=True).encode()).hexdigest()
    return out / f"{name}-{digest[:16]}.json"


def chosen(asked: str, known: Sequence[str]) -> list[str]:
    """Labels of a table that were asked for, separated by commas; all of them if none were.

    Raises:
        SystemExit: one that the table does not have.
    """
    labels = [label.strip() for label in asked.split(",") if label.strip()]
    if unknown := [label for label in labels if label not in known]:
        raise SystemExit(f"expected labels out of {', '.join(known)}, got {', '.join(unknown)}")
    return labels or list(known)
