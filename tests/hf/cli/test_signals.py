"""Commands that are asked to end: by Ctrl-C, by a batch system, by a terminal that hangs up."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from armorfact_hf import __main__ as program
from armorfact_hf.pruning.resume.journal import Journal
from armorfact_hf.report.record import Report
from armorfact_hf.runs import finish
from tests.hf.processes import begin, exit_code

ENDING = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
by_each_signal = pytest.mark.parametrize("number", ENDING, ids=lambda number: number.name)

WORK = """
import os, signal, sys, threading, time
from armorfact_hf.cli import signals

def send():
    os.kill(os.getpid(), int(sys.argv[1]))

with signals.ended_by_signals("The sentence."):
    try:
        {begin}
        time.sleep(20)
    finally:
        {clean_up}
        print("cleaned up", flush=True)
"""


def run(code: str, *arguments: object, **more) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        **more,
    )


def worked(number: int, begin: str = "send()", clean_up: str = "pass", **more) -> subprocess.CompletedProcess:
    return run(WORK.format(begin=begin, clean_up=clean_up), int(number), **more)


def ended(done: subprocess.CompletedProcess, number: int, sentence: str, said: str = "cleaned up\n") -> bool:
    return (done.returncode, done.stdout, done.stderr) == (128 + number, said, f"{sentence}\n")


@by_each_signal
def test_each_signal_cleans_up_and_says_the_sentence(number):
    assert ended(worked(number), number, "The sentence.")


@by_each_signal
def test_a_second_signal_does_not_disturb_the_cleaning_up(number):
    assert ended(worked(number, clean_up="send(); time.sleep(0.3); send()"), number, "The sentence.")


def test_a_signal_that_was_lost_may_be_sent_again():
    lost = "signals.GRACE = 0.0\n        class Lost:\n            __del__ = lambda self: send()\n        Lost(); send()"
    done = worked(signal.SIGTERM, begin=lost)
    assert done.returncode == 128 + signal.SIGTERM and done.stderr.endswith("The sentence.\n")
    assert "cleaned up" in done.stdout


def test_a_thread_that_still_computes_is_not_waited_for():
    busy = "threading.Thread(target=time.sleep, args=(50,)).start(); send()"
    assert ended(worked(signal.SIGINT, begin=busy), signal.SIGINT, "The sentence.")


def test_what_is_ignored_stays_ignored():
    done = run(
        WORK.format(begin="send(); print('goes on'); sys.exit(3)", clean_up="pass"),
        int(signal.SIGHUP),
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
    )
    assert (done.returncode, done.stdout, done.stderr) == (3, "goes on\ncleaned up\n", "")


def test_handlers_are_put_back():
    code = """
import signal
from armorfact_hf.cli.signals import SIGNALS, ended_by_signals
before = [signal.getsignal(number) for number in SIGNALS]
with ended_by_signals(""):
    assert before != [signal.getsignal(number) for number in SIGNALS]
assert before == [signal.getsignal(number) for number in SIGNALS]
"""
    assert run(code).returncode == 0


STARTING = """
import os, signal, sys
from armorfact_hf.__main__ import main

class SendsWhenImported:
    def find_spec(self, name, path=None, target=None):
        if name == {place!r}:
            os.kill(os.getpid(), {number})

sys.meta_path.insert(0, SendsWhenImported())
sys.argv = ["armorfact", *sys.argv[1:]]
main()
"""


@pytest.mark.parametrize("place", ["typer", "armorfact_hf.cli.commands", "torch"])
@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        (["prune", "nothing", "--out", "out"], program.CONTINUES["prune"]),
        (["prune", "nothing", "--out", "out", "--dry-run"], program.INTERRUPTED),
        (["inspect", "nothing"], program.INTERRUPTED),
    ],
)
def test_a_signal_that_comes_during_start_ends_alike(place, command, sentence, tmp_path):
    code = STARTING.format(place=place, number=int(signal.SIGTERM))
    assert ended(run(code, *command, cwd=tmp_path), signal.SIGTERM, sentence, said="")


def prune_until(number: int | None, method: str, arguments: list[str]) -> None:
    """The command, which is sent a signal when it has written two decoder blocks, or by a draft of its folder."""

    def send(*_) -> None:
        os.kill(os.getpid(), number)

    write = Journal.write

    def write_and_send(self, key, finished) -> None:
        write(self, key, finished)
        if key == "block-0001":
            send()

    if method == "Journal.write":
        Journal.write = write_and_send
    elif method == "write_report":
        finish.write_report = send
    sys.argv = ["armorfact", *arguments]
    program.main()


@by_each_signal
@pytest.mark.parametrize("method", ["Journal.write", "write_report"])
def test_a_run_that_is_asked_to_end_says_how_to_go_on_and_does(number, method, model_folder, text_file, tmp_path):
    out, says = tmp_path / "out", tmp_path / "says"
    arguments = [
        *("prune", str(model_folder), "--out", str(out), "--calibration", str(text_file)),
        *("--samples", "4", "--length", "24", "--method", "wanda", "--no-eval"),
    ]
    assert exit_code(begin(prune_until, number, method, arguments, says=says)) == 128 + number
    said = says.read_text().splitlines()
    assert said[-1] == program.CONTINUES["prune"] and "Traceback" not in "".join(said)
    blocks = {f"block-000{k}.safetensors" for k in range(2 if method == "Journal.write" else 3)}
    assert names(tmp_path / "out.journal") == {"manifest.json", *blocks} and not out.exists()
    assert exit_code(begin(prune_until, None, "", arguments)) == 0
    assert len(Report.read(out).layers) == 21 and names(tmp_path) == {"model", "text.txt", "out", "says"}


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}
