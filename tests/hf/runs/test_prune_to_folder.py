"""From a model folder to a finished one: whole or not at all, resumed bit for bit, refused before any work."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoTokenizer

from armorfact_hf import files
from armorfact_hf.checkpoint.folder import load_pruned
from armorfact_hf.data.calibration import Calibration
from armorfact_hf.data.load_model import load_model
from armorfact_hf.evaluation.measure import Evaluation
from armorfact_hf.pruning.config import PruneConfig
from armorfact_hf.pruning.resume.journal import Journal
from armorfact_hf.pruning.resume.manifest import DifferentRun
from armorfact_hf.report.record import Report
from armorfact_hf.runs import finish
from armorfact_hf.runs import prune_to_folder as workflow
from armorfact_hf.runs.evaluate import evaluate_folder
from armorfact_hf.runs.inspect import inspect_folder
from armorfact_hf.runs.prune_to_folder import prune_to_folder
from tests.hf.models import BLOCKS, random_text, random_tokens
from tests.hf.observers import Planned, Silent, Stepping
from tests.hf.processes import begin, exit_code
from tests.hf.runs.folders import OURS, QUICK, names, nbytes, prune, saved, silent

pytestmark = pytest.mark.usefixtures("own_cache")

RESUMED = {
    "pruned": OURS,
    "dense": replace(OURS, propagate="dense"),
    "output": replace(OURS, target="output", head=True),
}
FINISHED = {
    "README.md",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "report.html",
    "report.json",
    "tokenizer.json",
    "tokenizer_config.json",
}


# A finished folder


def test_a_finished_folder_is_whole_and_alone(model_folder, text_file, out):
    report = prune(model_folder, out, text_file, OURS)
    assert names(out) == FINISHED
    assert names(out.parent) == {"model", "text.txt", "pruned"}
    assert Report.read(out).layers and len(report.layers) == 7 * BLOCKS
    assert AutoTokenizer.from_pretrained(out)("w5 w3")["input_ids"] == [5, 3]
    assert torch.isfinite(load_pruned(out)(random_tokens()).logits).all()


def test_the_same_call_again_returns_the_report_without_pruning(model_folder, text_file, out, monkeypatch):
    first = prune(model_folder, out, text_file)
    monkeypatch.setattr(workflow, "prune_job_", None)
    assert prune(model_folder, out, text_file) == first == Report.read(out)


def test_a_loaded_model_is_pruned_in_place_into_the_same_files(model_folder, text_file, out, tmp_path):
    prune(model_folder, out, text_file)
    loaded, other = load_model(str(model_folder)), tmp_path / "other"
    prune_to_folder(loaded, other, QUICK, Calibration(str(text_file), 4, 24), observer=Silent())
    assert (other / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()
    tokens = random_tokens()
    torch.testing.assert_close(loaded.model(tokens).logits, load_pruned(out)(tokens).logits, rtol=0, atol=0)


@pytest.mark.parametrize("config", RESUMED.values(), ids=RESUMED)
def test_no_layer_ends_above_the_start_of_its_objective(config, model_folder, text_file, out):
    layers = prune(model_folder, out, text_file, config).layers
    assert all(0 < layer.objective_loss <= layer.objective_initial_loss for layer in layers)
    assert any(layer.objective_loss < 0.9 * layer.objective_initial_loss for layer in layers)


def test_totals_are_those_of_what_was_pruned(model_folder, text_file, out):
    """A layer that no token reaches stays dense, and is not counted."""
    loaded = load_model(str(model_folder))
    loaded.model.model.layers[-1].extra = torch.nn.Linear(32, 32, bias=False)
    report = prune_to_folder(loaded, out, OURS, Calibration(str(text_file), 4, 24), observer=Silent())
    assert [layer.name for layer in report.dense_layers if "no calibration token" in layer.reason] == [
        f"model.layers.{BLOCKS - 1}.extra"
    ]
    assert report.totals.dense_bytes == sum(layer.dense_bytes for layer in report.layers)
    assert report.totals.bytes == sum(layer.bytes for layer in report.layers)


# Folders of other runs


class Interrupted(Exception):
    """Ends a run in the middle."""


def interrupt(model: Path, out: Path, text: Path, config: PruneConfig = QUICK) -> Path:
    """Run until two decoder blocks are finished; the folder of the journal."""

    def progress(step):
        if step.doing.startswith(f"decoder block {BLOCKS} "):
            raise Interrupted

    with pytest.raises(Interrupted):
        prune(model, out, text, config, observer=Stepping(progress))
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
    killer = Killer(at)
    if place == "file":
        files.os.fsync = killer
    elif place == "report":
        finish.write_report = killer
    prune(model, out, text, config, observer=Stepping(killer) if place == "step" else Silent())


def start(*arguments):
    """`run_until` in a fresh process."""
    return begin(run_until, *arguments)


@pytest.fixture
def ends_alike(model_folder, text_file, tmp_path, out):
    """Asserts that a run that was killed goes on to the end of one that was not."""

    def check(config: PruneConfig) -> None:
        whole = tmp_path / "whole"
        for folder in (whole, out):
            assert exit_code(start("step", None, model_folder, folder, text_file, config)) == 0
        assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
        assert names(out) == FINISHED and not out.with_name("pruned.journal").exists()

    return check


@pytest.mark.parametrize("setting", RESUMED)
def test_a_run_killed_anywhere_ends_with_the_same_bits(setting, ends_alike, model_folder, text_file, out):
    source = random.Random(setting)
    places = [("step", source.randint(1, 30)) for _ in range(2)] + [("file", source.randint(1, 8)), ("report", 1)]
    for place, at in places:
        assert exit_code(start(place, at, model_folder, out, text_file, RESUMED[setting])) == -signal.SIGKILL
    ends_alike(RESUMED[setting])


def test_a_run_killed_at_any_time_ends_with_the_same_bits(ends_alike, model_folder, text_file, out):
    delays = random.Random(0)
    for _ in range(3):
        process = start("step", None, model_folder, out, text_file, OURS)
        process.join(delays.uniform(0.1, 0.9))
        process.kill()
    ends_alike(OURS)


def test_a_run_killed_while_it_writes_leaves_nothing_behind(model_folder, text_file, out):
    assert exit_code(start("report", 1, model_folder, out, text_file, QUICK)) == -signal.SIGKILL
    prune(model_folder, out, text_file)
    assert names(out.parent) == {"model", "text.txt", "pruned"}


def test_a_run_stopped_before_its_journal_is_removed_removes_it_when_called_again(
    model_folder, text_file, out, monkeypatch
):
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "remove", raising(Interrupted()))
        with pytest.raises(Interrupted):
            prune(model_folder, out, text_file)
    assert (out / "report.json").exists() and out.with_name("pruned.journal").exists()
    prune(model_folder, out, text_file)
    assert names(out.parent) == {"model", "text.txt", "pruned"}


def raising(error: BaseException):
    def act(*_, **__):
        raise error

    return act


# Damaged journals


def halved(content: bytes) -> bytes:
    return content[: len(content) // 2]


def flipped(content: bytes, bit: int = 8 * 8 + 3) -> bytes:
    """One bit changed; by default, where the header of a safetensors file begins."""
    return content[: bit // 8] + bytes([content[bit // 8] ^ 1 << bit % 8]) + content[bit // 8 + 1 :]


@pytest.mark.parametrize("damage", [halved, flipped, lambda content: b""], ids=["halved", "flipped", "empty"])
def test_a_damaged_block_of_the_journal_is_named_and_made_again(damage, model_folder, text_file, out, tmp_path):
    prune(model_folder, tmp_path / "whole", text_file)
    path = interrupt(model_folder, out, text_file) / "block-0001.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=re.escape(str(path)) + ".*delete that one file"):
        prune(model_folder, out, text_file)
    path.unlink()
    prune(model_folder, out, text_file)
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("content", ["", "{", "[]"])
def test_a_damaged_manifest_of_the_journal_is_named(content, model_folder, text_file, out):
    path = interrupt(model_folder, out, text_file) / "manifest.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=re.escape(str(path)) + ".*delete"):
        prune(model_folder, out, text_file)


def test_a_bit_that_flips_in_a_header_is_told_or_harmless(model_folder, text_file, out):
    path = interrupt(model_folder, out, text_file, OURS) / "block-0001.safetensors"
    manifest = json.loads((path.parent / "manifest.json").read_text())
    whole, stored = path.read_bytes(), Journal.open(path.parent, manifest, "2:4")

    def read() -> str | list[dict]:
        try:
            return [layer.state_dict() for layer, _ in stored.read(path.stem).layers]
        except ValueError as error:
            return str(error)

    expected, told = read(), 0
    header = 8 + int.from_bytes(whole[:8], "little")
    of_block = 8 * (re.search(rb'"block\W+4', whole).end() - 1) + 2  # makes a block of 0 of a block of 4
    for bit in [of_block, *random.Random(0).sample(range(8 * header), 200)]:
        path.write_bytes(flipped(whole, bit))
        if isinstance(found := read(), str):
            assert str(path) in found
            told += 1
        else:
            assert all(torch.equal(x[key], y[key]) for x, y in zip(found, expected, strict=True) for key in y)
    assert told > 100


# Errors, all before any work


@pytest.fixture
def refused(model_folder, text_file, out, monkeypatch):
    """Asserts that a run ends with an error, before anything is computed or written."""
    monkeypatch.setattr(workflow, "prune_job_", None)

    def check(message: str, model=model_folder, text=text_file, folder=out, error=ValueError, **more):
        before = names(out.parent)
        with pytest.raises(error, match=message):
            prune(model, folder, text, **more)
        assert names(out.parent) == before

    return check


def test_a_full_disk_is_told_beforehand(refused, monkeypatch):
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    refused(r"pruned needs 0\.00 GB of disk, 0\.00 GB are free; make room or name another", error=OSError)


def test_a_disk_with_just_enough_room_is_enough(model_folder, text_file, out, tmp_path, monkeypatch):
    prune(model_folder, out, text_file)
    needed = nbytes(out) + sum(layer.bytes for layer in inspect_folder(out))  # the journal, and what comes of it
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: SimpleNamespace(free=needed))
    prune(model_folder, tmp_path / "again", text_file)
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: SimpleNamespace(free=needed - 1))
    with pytest.raises(OSError, match="make room"):
        prune(model_folder, tmp_path / "a third time", text_file)


@pytest.mark.parametrize(
    "config",
    [QUICK, OURS, replace(OURS, tail=2, head=True), replace(OURS, core_dtype="int8"), replace(OURS, refine=None)],
    ids=["wanda", "matched", "head", "int8", "layers"],
)
def test_the_plan_counts_all_that_stands_on_disk_at_a_time(config, model_folder, text_file, out, monkeypatch):
    found, remove = [], Journal.remove

    def last_look(journal):
        found.append(nbytes(out) + nbytes(journal.folder))
        remove(journal)

    monkeypatch.setattr(Journal, "remove", last_look)
    plans = []
    prune(model_folder, out, text_file, config, observer=Planned(plans.append))
    assert found == [plans[0].disk_bytes]


@pytest.mark.parametrize("windows", [2, 40])
def test_what_waits_on_disk_has_gone_when_the_finished_folder_is_written(windows, model_folder, text_file, out):
    held, plans = [], []
    text_file.write_text(random_text(40 * 24))

    class Watched(Planned):
        def step(self, step):
            waiting = out.parent.glob("pruned.journal/.states-*/states/**/*")
            held.append(sum(path.stat().st_size for path in waiting if path.is_file()))

    calibration, config = Calibration(str(text_file), windows, 24), replace(OURS, refine=None)
    prune_to_folder(str(model_folder), out, config, calibration, states="disk", observer=Watched(plans.append))
    [plan] = plans
    assert 0 < max(held) == plan.waiting_bytes
    journal = sum(layer.bytes for layer in plan.layers)
    assert plan.disk_bytes == journal + max(plan.waiting_bytes + journal // BLOCKS, nbytes(out))
    assert (plan.waiting_bytes > nbytes(out)) == (windows == 40)


def test_a_run_that_ends_in_its_plan_leaves_nothing(model_folder, text_file, out):
    def leave(plan):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prune(model_folder, out, text_file, observer=Planned(leave))
    assert names(out.parent) == {"model", "text.txt"}


def test_what_a_killed_run_left_needs_no_room_again(model_folder, text_file, out, monkeypatch):
    def killed(step):
        if step.done > 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prune(model_folder, out, text_file, observer=Stepping(killed))
    [journal] = out.parent.glob("*.journal")
    left = sum(path.stat().st_size for path in journal.iterdir())
    plans = []
    prune(model_folder, out.with_name("other"), text_file, observer=Planned(plans.append))
    needed = plans[0].disk_bytes - left
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: SimpleNamespace(free=needed - 1))
    with pytest.raises(OSError, match="make room"):
        prune(model_folder, out, text_file)
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: SimpleNamespace(free=needed))
    prune(model_folder, out, text_file)


def test_an_unwritable_folder_is_told_beforehand(refused, monkeypatch):
    monkeypatch.setattr(files, "TemporaryDirectory", raising(PermissionError()))
    refused("is not writable; name another folder", error=PermissionError)


def test_a_folder_below_a_file_is_told_beforehand(refused, text_file):
    refused("text.txt is a file; name another folder", folder=text_file / "x" / "y", error=NotADirectoryError)


@pytest.mark.parametrize("damage", [halved, lambda content: content[:-1], flipped, lambda content: b""])
def test_a_damaged_file_of_the_model_is_named(damage, refused, model_folder):
    path = model_folder / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    refused(re.escape(str(path)) + r" is damaged or cannot be read \(.+\): copy or download it again")


def test_a_missing_shard_is_named(refused, tmp_path):
    folder = saved("llama", tmp_path / "sharded", max_shard_size="50KB")
    (folder / "model-00002-of-00003.safetensors").unlink()
    refused("lacks model-00002-of-00003.safetensors, which its index lists: copy or download it again", model=folder)


@pytest.mark.parametrize("content", ["", "{", "{}", "[]", '{"weight_map": 1}'])
def test_a_damaged_index_is_named(content, refused, tmp_path):
    folder = saved("llama", tmp_path / "sharded", max_shard_size="50KB")
    index = folder / "model.safetensors.index.json"
    index.write_text(content)
    refused(re.escape(str(index)), model=folder)


@pytest.mark.parametrize(
    ("removed", "message"),
    [
        ("config.json", r"holds no model \(it has no config\.json\): name a folder"),
        ("model.safetensors", "holds no safetensors file"),
        ("tokenizer", r"has no tokenizer that transformers can load \(.*\): put its files there"),
    ],
)
def test_a_folder_without_a_part_of_a_model_is_told(removed, message, refused, model_folder):
    for path in model_folder.glob(f"{removed}*"):
        path.unlink()
    refused(re.escape(str(model_folder)) + " " + message)


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"version": "1.0", "added'])
@pytest.mark.parametrize("stream", [False, True])
def test_a_damaged_tokenizer_is_told(content, stream, refused, model_folder):
    (model_folder / "tokenizer.json").write_text(content)
    refused(re.escape(str(model_folder)) + " has no tokenizer that transformers can load", stream=stream)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("demo:nope", "unknown demo model 'demo:nope': expected one of demo:smollm2, demo:gemma3-270m, "),
        ("nope", "'nope' is no folder, no name on the hub .* 'owner/name'.*demo:smollm2"),
        ("a/b/c", "'a/b/c' is no folder, no name on the hub"),
        ("./nope", "'./nope' is no folder, no name on the hub"),
        ("own er/name", "cannot load the model 'own er/name': "),
    ],
)
def test_a_name_of_no_model_is_told_what_names_there_are(name, message, refused):
    refused(message, model=name)


def test_a_model_that_is_pruned_already_is_refused(model_folder, text_file, out, tmp_path):
    prune(model_folder, out, text_file)
    with pytest.raises(ValueError, match="is pruned already"):
        prune(out, tmp_path / "again", text_file)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"no-such\.txt' is no text file, and none of the demo texts: demo:gensim-enwiki"),
        (b" \n", r"text\.txt holds no text"),
        (b"\xff\xfe", r"cannot read .*text\.txt as UTF-8 text"),
        (b"w3 " * 95, r"4 windows of 24 tokens need 96 tokens of text, got 95: ask for fewer or shorter windows"),
    ],
)
def test_a_text_that_will_not_do_is_told(content, message, refused, text_file, tmp_path):
    if content is not None:
        text_file.write_bytes(content)
    refused(message, text=text_file if content is not None else tmp_path / "no-such.txt")


def test_several_texts_share_the_windows(model_folder, text_file, tmp_path, out):
    other = tmp_path / "other.txt"
    other.write_text(" ".join(reversed(text_file.read_text().split())))
    loaded = load_model(str(model_folder), log=silent)

    def tokens(text, windows):
        return Calibration(text, windows, 24).tokens(loaded, silent)

    both = [str(text_file), str(other)]
    found = tokens(both, 5)
    assert torch.equal(found, torch.cat([tokens(both[0], 2), tokens(both[1], 3)]))
    assert torch.equal(tokens(both, None), torch.cat([tokens(text, None) for text in both]))
    report = prune_to_folder(str(model_folder), out, QUICK, Calibration(both, 4, 24), observer=Silent())
    assert (report.calibration.text, report.calibration.windows) == ("text.txt, other.txt", 4)
    for texts, windows in (([], 4), (both, 1)):
        with pytest.raises(ValueError, match="expected one text or more, and a window for each"):
            tokens(texts, windows)


def test_a_cache_that_cannot_be_written_loses_no_more_than_time(model_folder, text_file, out, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ARMORFACT_CACHE", str(tmp_path / "file" / "cache"))
    prune(model_folder, out, text_file, stream=True)
    report = evaluate_folder(out, [Evaluation(str(text_file), 2, 24)], observer=Silent())
    assert report.evaluations


def test_a_place_that_cannot_be_renamed_to_is_told_before_the_work(model_folder, text_file, out, tmp_path, monkeypatch):
    monkeypatch.setattr(workflow, "prune_job_", None)
    out.symlink_to(tmp_path / "not mounted")
    with pytest.raises(NotADirectoryError, match=r"is a link to .*not mounted, which is not there"):
        prune(model_folder, out, text_file)
    out.unlink()
    shared = Path("/dev/shm")
    if not shared.is_dir() or shared.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("needs a second disk")
    with TemporaryDirectory(dir=shared) as elsewhere:
        out.with_name(f"{out.name}.journal").symlink_to(elsewhere)
        with pytest.raises(OSError, match="is on another disk than"):
            prune(model_folder, out, text_file)


def test_it_imports_where_there_is_no_resource_module():
    code = (
        "import sys; sys.modules['resource'] = None; import armorfact_hf.free_memory, armorfact_hf.runs.prune_to_folder"
    )
    subprocess.run(
        [sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    )
