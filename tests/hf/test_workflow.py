"""From a model folder to a finished one: whole or not at all, resumed bit for bit, refused before any work."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import random
import re
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from armorfact_hf import assess, files, journal, workflow
from armorfact_hf.assess import Evaluation, compare, evaluate_folder
from armorfact_hf.checkpoint import NotPruned, load_pruned, stored_tensors
from armorfact_hf.config import PruneConfig
from armorfact_hf.journal import DifferentRun, Journal
from armorfact_hf.look import export_dense, inspect_folder
from armorfact_hf.sources import load_model
from armorfact_hf.workflow import Calibration, prune_to_folder, read_report
from tests.hf.conftest import BLOCKS, random_text, random_tokens, tiny_model, word_tokenizer

OURS = PruneConfig(sweeps=2)
QUICK = PruneConfig(method="wanda", baselines=())
RESUMED = {
    "pruned": OURS,
    "dense": replace(OURS, propagate="dense"),
    "output": replace(OURS, target="output", head=True),
}
FINISHED = {
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "report.html",
    "report.json",
    "tokenizer.json",
    "tokenizer_config.json",
}


def silent(sentence: str) -> None:
    """Where progress and sentences go."""


def prune(model: Path | str, out: Path, text: Path | str, config: PruneConfig = QUICK, **more):
    return prune_to_folder(str(model), out, config, Calibration(str(text), 4, 24), log=silent, **more)


def saved(family: str, folder: Path, **changes) -> Path:
    """A folder with a tiny model and its tokenizer."""
    shard_size = changes.pop("max_shard_size", "1GB")
    tiny_model(family, **changes).save_pretrained(folder, max_shard_size=shard_size)
    word_tokenizer().save_pretrained(folder)
    return folder


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def nbytes(folder: Path) -> int:
    return sum(tensor.nbytes for _, tensor in stored_tensors(folder))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("ARMORFACT_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    transformers_logging.disable_progress_bar()


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "pruned"


# A finished folder


def test_a_finished_folder_is_whole_and_alone(model_folder, text_file, out):
    report = prune(model_folder, out, text_file, OURS)
    assert names(out) == FINISHED
    assert names(out.parent) == {"model", "text.txt", "pruned"}
    assert read_report(out)["layers"] and len(report["layers"]) == 7 * BLOCKS
    assert AutoTokenizer.from_pretrained(out)("w5 w3")["input_ids"] == [5, 3]
    assert torch.isfinite(load_pruned(out)(random_tokens()).logits).all()


def test_the_same_call_again_returns_the_report_without_pruning(model_folder, text_file, out, monkeypatch):
    first = prune(model_folder, out, text_file)
    monkeypatch.setattr(workflow, "prune_", None)
    assert prune(model_folder, out, text_file) == first == json.loads((out / "report.json").read_text())


def test_a_loaded_model_is_pruned_in_place_into_the_same_files(model_folder, text_file, out, tmp_path):
    prune(model_folder, out, text_file)
    loaded, other = load_model(str(model_folder)), tmp_path / "other"
    prune_to_folder(loaded, other, QUICK, Calibration(str(text_file), 4, 24), log=silent)
    assert (other / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()
    tokens = random_tokens()
    torch.testing.assert_close(loaded.model(tokens).logits, load_pruned(out)(tokens).logits, rtol=0, atol=0)


@pytest.mark.parametrize("config", RESUMED.values(), ids=RESUMED)
def test_no_layer_ends_above_the_start_of_its_objective(config, model_folder, text_file, out):
    layers = prune(model_folder, out, text_file, config)["layers"]
    assert all(0 < layer["objective_loss"] <= layer["objective_initial_loss"] for layer in layers)
    assert any(layer["objective_loss"] < 0.9 * layer["objective_initial_loss"] for layer in layers)


# Folders of other runs


class Interrupted(Exception):
    """Ends a run in the middle."""


def interrupt(model: Path, out: Path, text: Path, config: PruneConfig = QUICK) -> Path:
    """Run until two decoder blocks are finished; the folder of the journal."""

    def progress(step):
        if step.doing.startswith(f"decoder block {BLOCKS} "):
            raise Interrupted

    with pytest.raises(Interrupted):
        prune(model, out, text, config, progress=progress)
    return out.with_name(f"{out.name}.journal")


@pytest.mark.parametrize("finished", [True, False], ids=["finished", "interrupted"])
@pytest.mark.parametrize(
    ("change", "differing"),
    [
        ("config", r"\(config.pattern: \"2:4\" there, \"1:4\" now\)"),
        ("text", r"\(calibration: \"\w+…? there, \"\w+…? now\)"),
        ("model", r"\(model: \"\w+…? there, \"\w+…? now\)"),
    ],
)
def test_another_run_is_refused_and_told_what_differs(finished, change, differing, model_folder, text_file, out):
    (prune if finished else interrupt)(model_folder, out, text_file)
    stands = out if finished else out.with_name("pruned.journal")
    config = replace(QUICK, pattern="1:4") if change == "config" else QUICK
    if change == "text":
        text_file.write_text(random_text(400, seed=1))
    if change == "model":
        saved("llama", model_folder, seed=1)
    before = names(stands)
    with pytest.raises(DifferentRun, match=differing + r"\. Give that run's arguments to continue it, name another"):
        prune(model_folder, out, text_file, config)
    assert names(stands) == before


@pytest.mark.parametrize("kind", ["file", "folder", "the model itself"])
def test_an_out_that_is_not_ours_is_refused_and_kept(kind, model_folder, text_file, out):
    if kind == "file":
        out.write_text("thesis")
    elif kind == "folder":
        out.mkdir()
    else:
        out = model_folder
    before = names(out.parent)
    with pytest.raises(DifferentRun, match=re.escape(str(out)) + r" exists .*: name another, or remove it"):
        prune(model_folder, out, text_file)
    assert names(out.parent) == before


def test_a_folder_in_place_of_the_journal_that_is_not_ours_is_kept(model_folder, text_file, out):
    kept = out.with_name("pruned.journal") / "thesis.txt"
    kept.parent.mkdir()
    kept.write_text("years of work")
    with pytest.raises(DifferentRun, match=re.escape(str(kept.parent))):
        prune(model_folder, out, text_file)
    assert kept.read_text() == "years of work"


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


def run_until(place: str, at: int | None, model: Path, out: Path, text: Path, config: PruneConfig) -> None:
    """Run in a process of its own, killed at a step, before a file of the journal is named, or before the report."""
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()
    killer = Killer(at)
    if place == "file":
        files.os.fsync = killer
    elif place == "report":
        workflow.write_report = killer
    prune(model, out, text, config, progress=killer if place == "step" else None)


@pytest.fixture(scope="module")
def start():
    """Starts `run_until` in a fresh process, forked from one that has imported everything and computed nothing."""
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload([*PRELOADED, __name__])
    began = []

    def start(*arguments):
        process = processes.Process(target=run_until, args=arguments)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PYTHONPATH", os.pathsep.join(PATHS))
            process.start()
        began.append(process)
        return process

    yield start
    for process in began:
        process.kill()
        process.join()


ROOT = Path(__file__).parents[2]
PATHS = [str(ROOT), str(ROOT / "adapters")]
PRELOADED = ["torch", "numba", "transformers.modeling_utils", "transformers.models.llama.modeling_llama"]


def exit_code(process) -> int:
    process.join(60)
    return process.exitcode


@pytest.fixture
def uninterrupted(start, model_folder, text_file, tmp_path):
    """The bytes of the weights that a run without interruption writes."""

    def weights(config: PruneConfig) -> bytes:
        whole = tmp_path / "whole"
        assert exit_code(start("step", None, model_folder, whole, text_file, config)) == 0
        return (whole / "model.safetensors").read_bytes()

    return weights


@pytest.mark.parametrize("setting", RESUMED)
def test_a_run_killed_anywhere_ends_with_the_same_bits(setting, start, uninterrupted, model_folder, text_file, out):
    config, source = RESUMED[setting], random.Random(setting)
    expected = uninterrupted(config)
    arguments = (model_folder, out, text_file, config)
    places = [("step", source.randint(1, 30)) for _ in range(3)] + [("file", source.randint(1, 2)), ("report", 1)]
    codes = [exit_code(start(place, at, *arguments)) for place, at in places]
    print(places, codes)
    assert codes[0] == -signal.SIGKILL and set(codes) <= {0, -signal.SIGKILL}
    assert exit_code(start("step", None, *arguments)) == 0
    assert (out / "model.safetensors").read_bytes() == expected
    assert names(out) == FINISHED and not out.with_name("pruned.journal").exists()
