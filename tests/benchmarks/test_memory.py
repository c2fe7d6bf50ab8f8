"""The benchmark of a layer's peak memory."""

from __future__ import annotations

import sys

from benchmarks import memory

SHAPE = 256, 512


def test_a_line_for_each_part_says_what_it_takes_beyond_what_it_is_given(monkeypatch, capsys):
    parts = "sparsegpt", "prune_layer, target output"
    monkeypatch.setattr(memory, "PARTS", parts)
    monkeypatch.setattr(sys, "argv", ["memory", "--shapes", "256x512", "--sweeps", "1"])
    memory.main()
    _, _, *lines = capsys.readouterr().out.splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert [row[:2] for row in cells] == [[part, "256 x 512"] for part in parts]
    assert all(float(row[3]) > 1 for row in cells)


def test_every_part_has_work():
    assert all(memory.work(part, SHAPE, 1)() is not None for part in memory.PARTS)
