"""The command line: it says when it is not finished, goes on, prints its tables and draws its plots."""

from __future__ import annotations

import sys

import pytest

from armorfact_hf.data.calibration import Calibration
from benchmarks.evidence import __main__ as command
from benchmarks.evidence import methods
from benchmarks.evidence.experiment import Settings


@pytest.fixture
def call(model_folder, text_file, tmp_path, monkeypatch):
    """A function that runs the command on a tiny model, by three of the methods."""
    few = {name: methods.METHODS[name] for name in ("magnitude", "wanda", "armorfact")}
    monkeypatch.setitem(command.SETS, "proxy", few)
    calibration = Calibration(str(text_file), windows=2, length=24)
    monkeypatch.setattr(command, "Settings", lambda **every: Settings(calibration, 1, str(text_file), 2, 64, **every))

    def run(*arguments):
        base = ["evidence", "proxy", "--model", str(model_folder), "--out", str(tmp_path / "out")]
        monkeypatch.setattr(sys, "argv", [*base, "--plots", str(tmp_path / "plots"), *arguments])
        command.main()

    return run


def test_a_run_out_of_time_says_so_and_the_next_one_finishes(call, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        call("--seconds", "-1")
    assert ended.value.code == command.UNFINISHED
    assert "goes on from here" in capsys.readouterr().err
    call()
    printed = capsys.readouterr().out
    assert "| G-H~ |" in printed and "| wanda |" in printed
    assert len(list((tmp_path / "plots").glob("*.svg"))) == 2
    assert list((tmp_path / "out").rglob("figures-*.json"))
