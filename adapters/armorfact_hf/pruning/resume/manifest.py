"""The manifest of a run: which model, settings and calibration tokens a folder is about.

A dictionary with one entry for each thing that two runs may differ in, so that a difference can be named.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from armorfact_hf.files import is_draft, written_beside
from armorfact_hf.pruning.resume.lock import LOCK, WRITER

MANIFEST = "manifest.json"


class DifferentRun(ValueError):
    """A folder holds the work of another run; the message says what differs."""


def flat_manifest(config: Mapping[str, Any], **others: Any) -> dict[str, Any]:
    """A manifest with one entry for every setting."""
    return {**{f"config.{key}": value for key, value in config.items()}, **others}


def digest_of(manifest: Mapping[str, Any]) -> str:
    """The sha256 of a manifest, in hexadecimal: what the files of a run name it by."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write the manifest of a folder, which has none."""
    with written_beside(folder / MANIFEST) as draft:
        draft.write_text(json.dumps(manifest, indent=2), encoding="utf-8")


def refuse_foreign(folder: Path, what: str) -> None:
    """Make sure that a folder without a manifest holds no more than a kill at the start can have left.

    A manifest is written before all else of a folder, and removed after it.

    Args:
        what: that a folder with a manifest holds, in words.

    Raises:
        DifferentRun: it holds something else.
    """
    foreign = _foreign_to(folder)
    if (folder / MANIFEST).exists():
        return
    if foreign & _foreign_to(folder):  # and not what its writer took away between these lines, manifest and all
        raise DifferentRun(f"{folder} exists and holds no {what}: name another, or remove it")


def _foreign_to(folder: Path) -> set[str]:
    try:
        return {path.name for path in folder.iterdir() if path.name not in (LOCK, WRITER) and not is_draft(path)}
    except FileNotFoundError:
        return set()


def read_manifest(folder: Path) -> Mapping[str, Any]:
    """The manifest of a folder, which has one.

    Raises:
        ValueError: it is damaged.
    """
    path = folder / MANIFEST
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError(f"expected a dictionary, got {type(found).__name__}")
        return found
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); delete its folder, and start again") from error


def check_same(stored: Mapping[str, Any], wanted: Mapping[str, Any], folder: Path) -> None:
    """Refuse to mix two runs.

    Raises:
        DifferentRun: names each entry that differs, with both values.
    """
    keys = [key for key in sorted({*stored, *wanted}) if stored.get(key) != wanted.get(key)]
    differing = [f"{key}: {_short(stored.get(key))} there, {_short(wanted.get(key))} now" for key in keys]
    if differing and not any(key in stored for key in keys):
        raise DifferentRun(
            f"{folder} is of an earlier version of armorfact, which did not note all that a run depends on "
            f"({'; '.join(differing)}): name another folder, or delete this one"
        )
    if differing:
        raise DifferentRun(
            f"{folder} belongs to another run ({'; '.join(differing)}). Give that run's arguments to continue it, "
            "name another output folder, or delete this one"
        )


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:36]}…"
