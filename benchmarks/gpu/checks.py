"""The tests marked gpu, in a pytest of their own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from benchmarks.gpu.parts import Item
from benchmarks.gpu.report import Skipped, Values
from benchmarks.gpu.setup import Setup

ROOT = Path(__file__).parents[2]
NEEDED = ("pytest", "hypothesis")
# The libraries of the machine are not those of CI: what they warn of is no failure here.
OPTIONS = ["-v", "-m", "gpu", "-W", "default", "--color=no", "--tb=short", "-p", "no:cacheprovider"]
RUN = re.compile(r"(\S+::.+?) (PASSED|FAILED|SKIPPED|ERROR)(?: \((.*?)\))?(?: +\[ *\d+%\])?$")
SUMMARY = re.compile(r"(FAILED|ERROR) (\S+)(?: - (.*))?$")


def checks(setup: Setup) -> Iterator[Item]:
    """One figure a test, as soon as it ended; a test that failed is told again, with its error, at the end."""
    for name in NEEDED:
        if find_spec(name) is None:
            yield {"test": "all"}, partial(_outcome, "SKIPPED", f"{name} is not installed")
            return
    last = ""
    with subprocess.Popen(
        [sys.executable, "-m", "pytest", *OPTIONS, *_files()],
        cwd=ROOT,
        env=os.environ | {"COLUMNS": "1000"},  # reasons are told whole
        stdout=subprocess.PIPE,
        text=True,
    ) as pytest:
        for line in pytest.stdout or ():
            last = line.strip() or last
            yield from _told(line.strip())
    if pytest.returncode not in (0, 1):
        yield {"test": "all"}, partial(_outcome, "FAILED", f"pytest ended with code {pytest.returncode}: {last}")


def _files() -> list[str]:
    """Only the files that hold such tests: others may need libraries that the machine lacks."""
    return [str(path) for path in sorted(ROOT.glob("tests/**/test_*.py")) if "pytest.mark.gpu" in path.read_text()]


def _told(line: str) -> Iterator[Item]:
    """What a line of pytest tells of a test."""
    if found := RUN.match(line):
        yield {"test": found[1]}, partial(_outcome, found[2], found[3] or "")
    elif found := SUMMARY.match(line):
        yield {"test": found[2]}, partial(_outcome, found[1], found[3] or "")


def _outcome(word: str, message: str) -> Values:
    if word == "SKIPPED":
        raise Skipped(message)
    if word != "PASSED":
        raise AssertionError(message)
    return {"passed": 1}
