"""The notebook runs from its first cell to its last, on a tiny model."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.hf.models import random_text
from tests.hf.runs.folders import saved

nbformat = pytest.importorskip("nbformat")
matplotlib = pytest.importorskip("matplotlib")

NOTEBOOK = Path(__file__).parents[2] / "examples" / "prune_and_compare.ipynb"


def test_every_cell_runs(tmp_path, monkeypatch, capsys):
    matplotlib.use("Agg")
    monkeypatch.setenv("ARMORFACT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    text = tmp_path / "text.txt"
    text.write_text(random_text(400))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    first, *rest = [cell for cell in notebook.cells if cell.cell_type == "code"]
    names: dict[str, object] = {}
    exec(first.source, names)
    small = {"MODEL": str(saved("llama", tmp_path / "model")), "OUT": tmp_path / "pruned", "TEXT": str(text)}
    small |= {"SAMPLES": 4, "LENGTH": 24, "WINDOWS": 2, "SWEEPS": 1, "PROMPT": "w5 w6 w7"}
    assert small.keys() <= names.keys()
    names |= small
    for cell in rest:
        exec(cell.source, names)
    printed = capsys.readouterr().out
    assert all(f"{name} " in printed for name in ("dense", "wanda", "sparsegpt", "armorfact"))
    assert "w5 w6 w7" in printed.splitlines()[-1]
    assert not any(cell.get("outputs") for cell in notebook.cells)  # figures stand beside their command, in docs
