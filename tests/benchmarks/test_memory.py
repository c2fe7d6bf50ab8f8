"""The benchmark of a layer's peak memory."""

from __future__ import annotations

import json
import sys

import pytest

from benchmarks import memory


@pytest.mark.parametrize("part", memory.PARTS)
def test_what_a_part_takes_is_printed_as_one_number(part, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["memory", "--shapes", "256x512", "--sweeps", "1", "--part", part])
    memory.main()
    assert json.loads(capsys.readouterr().out) > 0
