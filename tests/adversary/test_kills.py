"""Runs that are killed, asked to end, begun twice at once, whose journals are damaged: they end with the same bits."""

from __future__ import annotations

import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from armorfact_hf import __main__ as program
from tests.adversary.soak import Soak
from tests.hf.models import random_text
from tests.hf.processes import begin, exit_code
from tests.hf.runs.folders import names, saved

ZEROS = ("other bits", "damage that was not told", "runs that could not go on")
ENDINGS = [signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP]
REFUSED = "is being written by"


def armorfact(*arguments: str) -> None:
    """The command, as `armorfact` runs it."""
    sys.argv = ["armorfact", *arguments]
    program.main()


@dataclass
class Adversary:
    """Works against one run, into the folder ``work/out``.

    Args:
        soak: counts. source: of its choices. command: the run. whole: the weights that a run ends with which nobody
            disturbs. duration: how long that takes, in seconds.
    """

    soak: Soak
    source: random.Random
    command: list[str]
    work: Path
    whole: bytes
    duration: float

    def start(self, says: str = "says") -> multiprocessing.Process:
        return begin(armorfact, *self.command, "--out", str(self.work / "out"), says=self.work / says)

    def kill(self) -> None:
        """End a run at a random time, if it did not end by itself before."""
        process, how = self.start(), self.source.choice(ENDINGS)
        process.join(self.source.uniform(0.05, self.duration))
        if process.exitcode is None:
            os.kill(process.pid, how)
            self.soak.found["kills survived"] += 1
        if exit_code(process) is None:
            self.stuck(self.work / "says")

    def damage(self) -> None:
        """Flip a bit of the journal; it has to be told, and deleting what is named has to be the way out."""
        journal = self.work / "out.journal"
        files = [path for path in sorted(journal.glob("*.safetensors")) if not superseded(path)]
        if not files or (self.work / "out").exists():  # nothing needs the journal of a finished folder
            return
        path = self.source.choice(files)
        content = bytearray(path.read_bytes())
        content[self.source.randrange(len(content))] ^= 1 << self.source.randrange(8)
        path.write_bytes(content)
        self.soak.found["damaged layers" if "-layer-" in path.name else "damaged blocks"] += 1
        ended, said = exit_code(self.start()), (self.work / "says").read_text()
        if ended == 0 or not re.search(re.escape(str(path)) + r" is damaged \(.*delete that one file", said):
            self.soak.found["damage that was not told"] += 1
            print(ended, said, names(self.work))
        path.unlink(missing_ok=True)

    def run_two(self) -> None:
        """Two writers at once: each ends the run, finds it finished, or is refused."""
        self.soak.found["pairs of writers"] += 1
        first = self.start("first")
        time.sleep(self.source.uniform(0, self.duration))
        second = self.start("second")
        for process, says in ((first, "first"), (second, "second")):
            if exit_code(process) != 0 and REFUSED not in (self.work / says).read_text():
                self.stuck(self.work / says)

    def complete(self) -> None:
        ended = exit_code(self.start())
        clean = not (self.work / "out.journal").exists()
        if ended != 0 or not clean:
            self.stuck(self.work / "says")
        elif (self.work / "out" / "model.safetensors").read_bytes() == self.whole:
            self.soak.found["runs with equal bits"] += 1
        else:
            self.soak.found["other bits"] += 1

    def stuck(self, says: Path) -> None:
        self.soak.found["runs that could not go on"] += 1
        print(says.read_text(), names(self.work))


def superseded(path: Path) -> bool:
    """Whether a kill left a single layer beside its finished block: nothing needs it any more."""
    block, layer, _ = path.stem.partition("-layer-")
    return bool(layer) and path.with_name(f"{block}.safetensors").exists()


@pytest.fixture
def command(tmp_path) -> list[str]:
    model, text = saved("llama", tmp_path / "model"), tmp_path / "text.txt"
    text.write_text(random_text(400))
    return [
        *("prune", str(model), "--calibration", str(text), "--samples", "4", "--length", "24", "--sweeps", "1"),
        *("--baseline", "none", "--no-eval"),
    ]


def soak_kills(soak: Soak, command: list[str], tmp_path: Path) -> None:
    undisturbed = begin(armorfact, *command, "--out", str(tmp_path / "whole"), says=tmp_path / "says")
    assert exit_code(undisturbed) == 0
    whole = (tmp_path / "whole" / "model.safetensors").read_bytes()
    clock = time.monotonic()
    assert exit_code(begin(armorfact, *command, "--out", str(tmp_path / "again"), says=tmp_path / "says")) == 0
    duration = time.monotonic() - clock
    for seed in soak.seeds():
        source, work = random.Random(seed), tmp_path / "work"
        work.mkdir()
        adversary = Adversary(soak, source, command, work, whole, duration)
        for _ in range(source.randint(2, 6)):
            adversary.kill()
            if source.random() < 0.4:
                adversary.damage()
        if source.random() < 0.3:
            adversary.run_two()
        adversary.complete()
        shutil.rmtree(work)
    soak.close(*ZEROS)


def test_a_run_that_is_disturbed_in_every_way(command, tmp_path):
    soak_kills(Soak("kills", 1, 60), command, tmp_path)


def test_a_run_that_is_killed_damaged_and_begun_twice(command, tmp_path):
    """Each of them, whatever the seed of the others draws."""
    soak, work = Soak("kills", 1, 60), tmp_path / "work"
    assert exit_code(begin(armorfact, *command, "--out", str(tmp_path / "whole"), says=tmp_path / "says")) == 0
    work.mkdir()
    whole = (tmp_path / "whole" / "model.safetensors").read_bytes()
    adversary = Adversary(soak, random.Random(1), command, work, whole, 1.0)
    process = adversary.start()
    for _ in range(600):  # until a block, or a layer of one, is written
        if list(work.glob("out.journal/*.safetensors")):
            break
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    adversary.damage()
    adversary.run_two()
    adversary.complete()
    assert soak.found["damaged layers"] + soak.found["damaged blocks"] == 1
    assert soak.found["pairs of writers"] == soak.found["runs with equal bits"] == 1
    assert not any(soak.found[what] for what in ZEROS)


@pytest.mark.slow
def test_many_disturbed_runs(command, tmp_path):
    soak_kills(Soak.long("kills", 200), command, tmp_path)
