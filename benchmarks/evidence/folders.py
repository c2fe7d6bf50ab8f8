"""The pruned folders that figures are of, and under what their figures are kept."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from armorfact_hf.report.record import Report

DENSE = "dense"


def reports_of(folders: Sequence[Path]) -> list[Report]:
    """The reports of folders that stand beside each other in a table, by name.

    Raises:
        ValueError: none, folders of different models, or names that would be taken for each other.
    """
    reports = [Report.read(folder) for folder in folders]
    if len({report.model.fingerprint for report in reports}) != 1:
        raise ValueError("expected one or more folders that `armorfact prune` wrote, all of one model")
    if len({DENSE, *(folder.name for folder in folders)}) != len(folders) + 1:
        raise ValueError(f"expected folders of different names, none of them {DENSE!r}: rename some, by links")
    return reports


def key_of(folder: Path) -> str:
    """Tells what a folder holds from what it held before: config.json has the digests of all tensors."""
    return f"{folder.name} {hashlib.sha256((folder / 'config.json').read_bytes()).hexdigest()}"
