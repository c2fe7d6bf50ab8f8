"""The benchmark of a journal's entries."""

from __future__ import annotations

import sys

import pytest

from benchmarks import journal

SMALL = ["--hidden", "16", "--inner", "32", "--heads", "2", "--kv-heads", "1", "--windows", "2", "--length", "8"]


@pytest.mark.parametrize(("experts", "layers"), [(0, 2 * 7), (2, 2 * (4 + 2 * 3))])
def test_every_layer_of_the_run_is_counted(experts, layers, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["journal", *SMALL, "--experts", str(experts), "--folder", str(tmp_path)])
    journal.main()
    assert f"\n| {layers} | " in capsys.readouterr().out and not list(tmp_path.iterdir())
