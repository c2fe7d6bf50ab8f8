"""`armorfact recover`: what it prints, what it writes, and how it fails."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from armorfact_hf.checkpoint.folder import load_pruned
from armorfact_hf.cli import commands, terminal
from armorfact_hf.recovery.settings import RecoverySettings
from armorfact_hf.report.record import Report
from tests.hf.runs.folders import OURS, names, prune, saved


@pytest.fixture(autouse=True)
def _own_cache_and_terminal(own_cache, monkeypatch):
    monkeypatch.setattr(terminal, "console", Console(width=200))


@pytest.fixture
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("ARMORFACT_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture
def folder(tmp_path, text_file) -> Path:
    prune(saved("gpt2", tmp_path / "dense", initializer_range=0.1), tmp_path / "pruned", text_file, OURS)
    return tmp_path / "pruned"


def armorfact(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(commands.app, [str(argument) for argument in arguments])
    unexpected = None if isinstance(result.exception, SystemExit) else result.exception
    assert (result.exit_code, unexpected) == (code, None), result.output
    return result.output


def test_the_command_recovers(folder, text_file):
    out = folder.with_name("recovered")
    given = ("--calibration", text_file, "--length", 24, "--windows", 10, "--train", "wrappers", "--rate", 1e-3)
    printed = armorfact("recover", folder, "--out", out, *given, "--steps", 12, "--measure-every", 6)
    recovery = Report.read(out).recovery
    assert recovery.settings == RecoverySettings("wrappers", steps=12, rate=1e-3, measure_every=6)
    assert (recovery.windows, recovery.kept_aside, recovery.steps) == (9, 1, 12)
    assert f"{recovery.before:.4f} nats a token from dense before, {recovery.after:.4f} after" in printed
    assert f"armorfact eval {out}" in printed
    assert names(out) == names(folder) and load_pruned(out) is not None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("--train", "norms"), "train must be one of factors, wrappers, got 'norms'"),
        (("--rate", 0), "rate must be a positive number"),
        (("--windows", 100), "100 windows of 24 tokens need 2400 tokens of text, got 400"),
        (("--teacher", "nobody"), "'nobody' is no folder"),
    ],
)
def test_errors_are_sentences(given, message, folder, text_file):
    out = folder.with_name("recovered")
    printed = armorfact("recover", folder, "--out", out, "--calibration", text_file, "--length", 24, *given, code=1)
    assert message in " ".join(printed.split()) and not out.exists()


def test_the_commands_teach_and_recover(folder, text_file):
    words, out = folder.with_name("words"), folder.with_name("recovered")
    text = ("--calibration", text_file, "--length", 24, "--windows", 10)
    printed = armorfact("teach", folder.with_name("dense"), "--out", words, "--likeliest", 9, *text)
    assert f"armorfact recover FOLDER --out OUT --teacher {words}" in printed
    printed = armorfact("recover", folder, "--out", out, "--teacher", words, *text, "--steps", 2)
    assert "on 1 windows kept aside (by its 9 likeliest words)." in printed
    assert Report.read(out).recovery.likeliest == 9
