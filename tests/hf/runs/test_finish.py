"""The end of a run: nothing is called finished that is not, and no work is lost for it."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from armorfact_hf.pruning.resume.journal import only_writer
from armorfact_hf.pruning.resume.manifest import DifferentRun
from armorfact_hf.report.record import Report
from armorfact_hf.runs import finish as finishing
from tests.hf.observers import Stepping
from tests.hf.processes import begin, exit_code
from tests.hf.runs.folders import names, prune

pytestmark = pytest.mark.usefixtures("own_cache")


def nothing_lost(out: Path) -> bool:
    blocks = {f"block-000{k}.safetensors" for k in range(3)}
    return not out.exists() and names(out.with_name("pruned.journal")) == {"manifest.json", *blocks}


def flip_last(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def drop_module(path: Path) -> None:
    config = json.loads(path.read_text())
    config["quantization_config"]["modules"].pop()
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("model.safetensors", flip_last),
        ("model.safetensors", lambda path: path.write_bytes(path.read_bytes()[:-1])),
        ("model.safetensors", Path.unlink),
        ("config.json", Path.unlink),
        ("config.json", drop_module),
    ],
)
def test_a_folder_that_is_not_written_as_it_is_in_memory_is_told_and_made_again(
    file, damage, model_folder, text_file, out, monkeypatch
):
    save = finishing.save_pruned

    def save_and_damage(model, draft, tokenizer) -> None:
        save(model, draft, tokenizer)
        damage(draft / file)

    with monkeypatch.context() as patch:
        patch.setattr(finishing, "save_pruned", save_and_damage)
        with pytest.raises(OSError, match=re.escape(f"{out} was not written as it is in memory (")) as told:
            prune(model_folder, out, text_file)
    assert "copy or download" not in str(told.value)
    assert nothing_lost(out)
    prune(model_folder, out, text_file)
    assert names(out.parent) == {"model", "text.txt", "pruned"}


def test_a_folder_that_somebody_makes_meanwhile_is_kept_and_so_is_the_work(model_folder, text_file, out, monkeypatch):
    save = finishing.save_pruned

    def save_late(model, draft, tokenizer) -> None:
        save(model, draft, tokenizer)
        out.mkdir()

    monkeypatch.setattr(finishing, "save_pruned", save_late)
    with pytest.raises(DifferentRun, match="was made by somebody else meanwhile"):
        prune(model_folder, out, text_file)
    out.rmdir()
    assert nothing_lost(out)


@pytest.mark.parametrize(
    ("lost", "told"),
    [
        ("config.json", "has no config.json"),
        ("model.safetensors", "holds no safetensors file"),
        ("tokenizer_config.json", "lacks tokenizer_config.json"),
    ],
)
def test_a_folder_that_lacks_a_file_is_not_finished(lost, told, model_folder, text_file, out):
    prune(model_folder, out, text_file)
    (out / lost).unlink()
    with pytest.raises(ValueError, match=f"pruned is not whole .*{told}.*: remove it, and the same call makes it"):
        prune(model_folder, out, text_file)


def test_a_folder_whose_file_is_cut_short_is_not_finished(model_folder, text_file, out):
    prune(model_folder, out, text_file)
    path = out / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"pruned is not whole \(.*model.safetensors is damaged"):
        prune(model_folder, out, text_file)


# Two writers


def test_a_second_writer_is_refused_and_the_first_one_ends_well(model_folder, text_file, out):
    says = out.with_name("says")

    def second(step) -> None:
        if not says.exists():
            process = begin(prune, model_folder, out, text_file, says=says)
            assert exit_code(process) == 1

    prune(model_folder, out, text_file, observer=Stepping(second))
    told = rf"InUse: .*pruned\.journal is being written by process {os.getpid()} on .* since "
    assert re.search(told, says.read_text())
    assert names(out.parent) == {"model", "text.txt", "pruned", "says"} and Report.read(out).layers


def test_a_writer_that_comes_when_the_first_one_is_done_finds_it_finished(model_folder, text_file, out, monkeypatch):
    """It looked before the first one was done, and gets the lock after."""
    whole = out.with_name("whole")
    prune(model_folder, whole, text_file)

    def lock_late(folder):
        whole.rename(out)
        return only_writer(folder)

    monkeypatch.setattr("armorfact_hf.runs.prune_to_folder.only_writer", lock_late)
    before = Report.read(whole)
    assert prune(model_folder, out, text_file) == before
    assert names(out.parent) == {"model", "text.txt", "pruned"}
