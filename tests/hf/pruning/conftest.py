"""A journal of its own for every test that asks for one."""

from __future__ import annotations

from pathlib import Path

import pytest

from armorfact_hf.pruning.resume.journal import Journal
from tests.hf.pruning.entries import MANIFEST, finished


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "out.journal"


@pytest.fixture
def journal(folder):
    with Journal.open(folder, MANIFEST, "2:4") as opened:
        yield opened


@pytest.fixture
def stored(journal) -> Path:
    """The file of a block that was written."""
    journal.write("block-0000", finished())
    return journal.folder / "block-0000.safetensors"
