"""The tiny model and text of the adapters' tests; few bootstrap draws."""

from __future__ import annotations

import pytest

from benchmarks.evidence import tables
from tests.hf.conftest import model_folder, text_file

__all__ = ["few_draws", "model_folder", "text_file"]


@pytest.fixture(autouse=True)
def few_draws(monkeypatch):
    """Intervals of 20 draws are wide, but no test of a table looks at more than their sign."""
    monkeypatch.setattr(tables, "DRAWS", 20)
