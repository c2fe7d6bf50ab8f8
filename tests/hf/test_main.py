"""The command's outermost edge: what it says when it cannot even begin."""

from __future__ import annotations

import pytest

from armorfact_hf import __main__ as command
from armorfact_hf.runs import load_to_prune as loading


def test_too_little_memory_is_a_sentence(monkeypatch):
    def load_model(*_, **__):
        raise MemoryError

    monkeypatch.setattr(loading, "load_model", load_model)
    monkeypatch.setattr("sys.argv", ["armorfact", "prune", "x/y", "--out", "nowhere", "--dry-run"])
    with pytest.raises(SystemExit, match="Error: this takes more memory than there is"):
        command.main()
