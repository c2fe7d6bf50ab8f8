"""From a pruned folder to a recovered one: whole or not at all, resumed bit for bit, refused before any work."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers.utils import logging as transformers_logging

from armorfact_hf import files
from armorfact_hf.checkpoint.description import NotPruned
from armorfact_hf.checkpoint.folder import load_pruned, stored_tensors
from armorfact_hf.data.calibration import Calibration
from armorfact_hf.data.load_model import load_model
from armorfact_hf.evaluation.measure import Evaluation
from armorfact_hf.pruning.resume import seal
from armorfact_hf.pruning.resume.manifest import DifferentRun
from armorfact_hf.recovery.divergence import Divergence
from armorfact_hf.recovery.run import kept_aside
from armorfact_hf.recovery.settings import RecoverySettings
from armorfact_hf.report.page import render_html
from armorfact_hf.report.record import Report
from armorfact_hf.runs import finish
from armorfact_hf.runs import recover as workflow
from armorfact_hf.runs.evaluate import evaluate_folder
from armorfact_hf.runs.inspect import inspect_folder
from armorfact_hf.runs.recover import recover_to_folder
from armorfact_hf.runs.teach import teach_to_folder
from tests.hf.models import random_text
from tests.hf.observers import Silent, Stepping
from tests.hf.runs.folders import OURS, names, prune, saved

pytestmark = pytest.mark.usefixtures("own_cache")

SETTINGS = RecoverySettings(steps=14, rate=0.004, warm_up=3, measure_every=4)


@pytest.fixture
def folder(tmp_path, text_file) -> Path:
    """A pruned folder whose dense model is far away."""
    model = saved("gpt2", tmp_path / "dense", initializer_range=0.1)
    prune(model, tmp_path / "pruned", text_file, OURS)
    return tmp_path / "pruned"


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "recovered"


def recover(folder: Path, out: Path, text: Path, settings: RecoverySettings = SETTINGS, **more) -> Report:
    calibration = Calibration(str(text), None, 24)
    return recover_to_folder(folder, out, settings, calibration, **{"save_every": 3, "observer": Silent()} | more)


def test_what_is_asked_wrongly_is_told_before_any_model_is_loaded(folder, out, text_file, monkeypatch):
    monkeypatch.setattr(workflow, "load_model", None)
    with pytest.raises(ValueError, match=r"nosuch\.txt' is no text file"):
        recover(folder, out, Path("nosuch.txt"))
    with pytest.raises(ValueError, match="is the folder to recover: name another"):
        recover(folder, folder / "." / ".." / folder.name, text_file)


def test_a_recovered_folder_is_whole_and_alone(folder, out, text_file):
    evaluate_folder(folder, [Evaluation(str(text_file), 2, 24)], observer=Silent())
    report = recover(folder, out, text_file)
    assert names(out) == names(folder) and names(out.parent) == {"dense", "pruned", "recovered", "text.txt"}
    assert Report.read(out) == report
    recovery, before = report.recovery, Report.read(folder)
    assert recovery.settings == SETTINGS and recovery.steps == 14 and recovery.windows + recovery.kept_aside == 16
    assert before.evaluations and not report.evaluations
    assert (report.layers, report.model, report.config) == (before.layers, before.model, before.config)
    assert "Recovery" in (out / "report.html").read_text() and "Recovery" not in (folder / "report.html").read_text()


def test_the_folder_holds_what_was_measured_and_supports_stay(folder, out, text_file):
    report = recover(folder, out, text_file)
    loaded, dense = load_model(str(out), log=lambda _: None), load_model(str(folder.parent / "dense"))
    for parameter in dense.model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    tokens = Calibration(str(text_file), None, 24).tokens(loaded, lambda _: None)
    values = [Divergence(loaded.model, dense.model).of(tokens[window]) for window in kept_aside(len(tokens))]
    assert sum(values) / len(values) == report.recovery.after < report.recovery.before
    before, after = dict(stored_tensors(folder)), dict(stored_tensors(out))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert before.keys() == after.keys() and changed
    assert {name.rpartition(".")[2] for name in changed} == {"left", "right", "values"}


def test_a_recovered_folder_is_recovered_and_measured_like_another(folder, out, text_file, tmp_path):
    first = recover(folder, out, text_file)
    second = recover(out, tmp_path / "again", text_file)
    assert second.recovery.before == first.recovery.after >= second.recovery.after
    report = evaluate_folder(out, [Evaluation(str(text_file), 2, 24)], observer=Silent())
    assert report.recovery == first.recovery and len(report.evaluations) == 1
    [measured] = report.evaluations[0].methods
    assert measured.mean_loss is None and "are those before" in render_html(report)
    assert {layer.loss for layer in inspect_folder(out)} == {None} != {layer.loss for layer in inspect_folder(folder)}


def test_the_same_call_again_returns_the_report_without_training(folder, out, text_file, monkeypatch):
    first = recover(folder, out, text_file)
    monkeypatch.setattr(workflow, "distil_", None)
    assert recover(folder, out, text_file) == first
    with pytest.raises(DifferentRun, match=r"config\.steps: 14 there, 15 now"):
        recover(folder, out, text_file, RecoverySettings(steps=15, rate=0.004, warm_up=3, measure_every=4))


def test_pruning_does_not_take_a_recovered_folder_for_its_own(folder, out, text_file):
    recover(folder, out, text_file)
    with pytest.raises(DifferentRun, match="belongs to another run"):
        prune(folder.parent / "dense", out, text_file, OURS)


def test_another_teacher_is_taken_by_name(folder, out, text_file, tmp_path):
    other = saved("gpt2", tmp_path / "other", seed=1, initializer_range=0.1)
    recovery = recover(folder, out, text_file, teacher=str(other)).recovery
    assert recovery.before > 0.2 and recovery.teacher == "other"  # of its own it is 0.05 away
    assert "its divergence from other on text" in (out / "README.md").read_text()
    assert "towards what other says" in " ".join((out / "report.html").read_text().split())


# Killed runs


class Killer:
    """Counts calls, and ends the process at one of them as a kill from outside would."""

    def __init__(self, at: int | None) -> None:
        self.left = at

    def __call__(self, *_) -> None:
        if self.left is not None:
            self.left -= 1
            if not self.left:
                os.kill(os.getpid(), signal.SIGKILL)


def run_until(place: str, at: int | None, folder: Path, out: Path, text: Path) -> None:
    """Run in a process of its own, killed at a step, before a file is named, or before the report; a step is NaN."""
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()
    backward = Divergence.backward

    def sometimes_nan(self, window):
        found = backward(self, window)
        return math.nan if int(window.sum()) % 5 == 0 else found  # some windows always are, whoever comes to them

    Divergence.backward = sometimes_nan
    killer = Killer(at)
    if place == "file":
        files.os.fsync = killer
    elif place == "report":
        finish.write_report = killer
    recover(folder, out, text, observer=Stepping(killer) if place == "step" else Silent())


@pytest.fixture(scope="module")
def start():
    """Starts `run_until` in a fresh process, forked from one that has imported everything and computed nothing."""
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["transformers.models.gpt2.modeling_gpt2", __name__])
    began = []

    def start(*arguments):
        began.append(processes.Process(target=run_until, args=arguments))
        began[-1].start()
        return began[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        yield start
    for process in began:
        process.kill()
        process.join()


def exit_code(process) -> int:
    process.join(60)
    return process.exitcode


def timeless(folder: Path) -> dict:
    """What recovery did, without the seconds."""
    return json.loads((folder / "report.json").read_text())["recovery"] | {"seconds": 0}


def test_a_run_killed_anywhere_ends_with_the_same_bits(start, folder, out, text_file):
    whole = out.with_name("whole")
    assert exit_code(start("step", None, folder, whole, text_file)) == 0
    source = random.Random(0)
    steps = [("step", source.randint(2, 7)) for _ in range(3)]
    for place, at in [*steps, ("file", 3), ("report", 1)]:
        assert exit_code(start(place, at, folder, out, text_file)) == -signal.SIGKILL
        assert not out.exists()
    assert exit_code(start("step", None, folder, out, text_file)) == 0
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert timeless(out) == timeless(whole) and 0 < len(timeless(out)["notes"]) < 8 and timeless(out)["best_step"]
    assert names(out.parent) == {"dense", "pruned", "recovered", "whole", "text.txt"}


# Errors, all before any work


@pytest.fixture
def refused(folder, out, text_file, monkeypatch):
    """Asserts that a run ends with an error, before anything is computed or written."""
    monkeypatch.setattr(workflow, "distil_", None)

    def check(message: str, error=ValueError, **more):
        before = names(out.parent)
        with pytest.raises(error, match=message):
            recover(**{"folder": folder, "out": out, "text": text_file} | more)
        assert names(out.parent) == before

    return check


def test_a_dense_folder_is_refused(refused, folder):
    refused("holds no model pruned by armorfact", NotPruned, folder=folder.parent / "dense")


def test_a_folder_without_a_report_is_refused(refused, folder):
    (folder / "report.json").unlink()
    refused("holds no report of armorfact")


def test_an_out_that_is_not_ours_is_refused(refused, out):
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    refused(re.escape(str(out)) + " exists and is no folder that armorfact finished", DifferentRun)


def test_the_folder_itself_as_out_is_refused(refused, folder):
    refused("is the folder to recover: name another one to write", out=folder)


def test_a_dense_model_that_changed_is_refused(refused, folder):
    shutil.rmtree(folder.parent / "dense")
    saved("gpt2", folder.parent / "dense", seed=2)
    refused("is not the model that was pruned: its weights have changed since")


def test_a_text_that_is_too_short_is_refused(refused, text_file):
    text_file.write_text(random_text(10))
    refused("windows of 24 tokens need 24 tokens of text, got 10")


def test_what_cannot_be_recovered_is_refused_before_there_is_a_journal(refused, text_file, folder):
    refused("the teacher is pruned", teacher=str(folder))
    text_file.write_text(random_text(30))
    refused("two windows of text or more")


@pytest.mark.parametrize("train", ["factors", "wrappers"])
def test_too_little_memory_is_told_with_what_to_lower(folder, out, text_file, monkeypatch, train):
    monkeypatch.setattr(workflow, "available", lambda device: 100_000)
    settings = replace(SETTINGS, train=train)
    with pytest.raises(ValueError, match=r"recovery takes 0\.0 GB beside .* \(--train wrappers\).* \(--teacher\)"):
        recover(folder, out, text_file, settings)
    assert not out.with_name("recovered.journal").exists()


def test_a_full_disk_is_told_beforehand(refused, monkeypatch):
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1000, 0, 1000))
    refused("make room or name another", OSError)


def test_a_disk_that_fills_up_keeps_the_state_before(folder, out, text_file, monkeypatch):
    saves, save_file = iter(range(10)), seal.save_file

    def full(*arguments, **more):
        if next(saves) == 1:
            raise OSError(28, "No space left on device")
        save_file(*arguments, **more)

    monkeypatch.setattr(seal, "save_file", full)
    with pytest.raises(files.DiskFull, match=r"state\.safetensors could not be written"):
        recover(folder, out, text_file)
    told = []
    observer = Silent()
    observer.say = told.append
    recover(folder, out, text_file, observer=observer)
    assert "Continuing after step 3 of 14." in told
    assert load_pruned(out) is not None


# A teacher on disk


def teach(folder: Path, words: Path, text: Path, likeliest: int = 96, **more):
    calibration = Calibration(str(text), None, 24)
    return teach_to_folder(str(folder.parent / "dense"), words, likeliest, calibration, **{"observer": Silent()} | more)


def test_the_words_of_a_teacher_stand_in_for_it(folder, out, text_file, tmp_path, monkeypatch):
    teach(folder, tmp_path / "words", text_file)
    shutil.rmtree(folder.parent / "dense")
    report = recover(folder, out, text_file, teacher=str(tmp_path / "words"))
    assert report.recovery.likeliest == 96 and report.recovery.after < report.recovery.before
    assert "likeliest words at each position" in (out / "report.html").read_text()
    assert "96 likeliest words at each position" in (out / "README.md").read_text()
    again = recover(folder, out, text_file, teacher=str(tmp_path / "words"))
    assert again == report


def test_a_killed_teacher_goes_on(folder, text_file, tmp_path):
    def stop(step):
        if step.done == 5:
            raise KeyboardInterrupt

    words = tmp_path / "words"
    with pytest.raises(KeyboardInterrupt):
        teach(folder, words, text_file, observer=Stepping(stop))
    assert len(list(words.glob("*.safetensors"))) == 5
    teach(folder, words, text_file)
    assert len(list(words.glob("*.safetensors"))) == 16 and not (words / "lock").exists()


def test_words_of_another_text_leave_nothing_behind(folder, out, text_file, tmp_path):
    (tmp_path / "other.txt").write_text(random_text(30, seed=9))
    teach(folder, tmp_path / "words", tmp_path / "other.txt")
    with pytest.raises(ValueError, match="of the 16 windows of the text"):
        recover(folder, out, text_file, teacher=str(tmp_path / "words"))
    assert not out.exists() and not out.with_name("recovered.journal").exists()


def test_words_that_are_there_need_no_room_again_and_those_of_another_text_do(folder, text_file, tmp_path, monkeypatch):
    (tmp_path / "other.txt").write_text(random_text(100, seed=9))
    teach(folder, tmp_path / "words", text_file)
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1000, 1000, 0))
    teach(folder, tmp_path / "words", text_file)
    with pytest.raises(OSError, match=r"needs .* GB of disk"):
        teach(folder, tmp_path / "words", tmp_path / "other.txt")


def test_too_little_room_for_words_is_told_first(folder, text_file, tmp_path, monkeypatch):
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1000, 900, 100))
    with pytest.raises(OSError, match=r"needs .* GB of disk"):
        teach(folder, tmp_path / "words", text_file)
    assert not (tmp_path / "words").exists()
