"""The journal of a run: what a kill may leave of it, and whose files it takes for its own."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from armorfact_hf.pruning.resume import journal as journals
from armorfact_hf.pruning.resume import manifest
from armorfact_hf.pruning.resume.entry import Finished
from armorfact_hf.pruning.resume.journal import PRICES, Journal, layer_key, remove_leftover
from armorfact_hf.pruning.resume.manifest import DifferentRun, check_same, refuse_foreign
from tests.hf.pruning.entries import MANIFEST, finished, same


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_closed_journal_holds_its_work_and_nothing_else(folder):
    with Journal.open(folder, MANIFEST, "2:4") as opened:
        opened.write("block-0000", finished())
    assert names(folder) == {"manifest.json", "block-0000.safetensors"}
    with Journal.open(folder, MANIFEST, "2:4") as opened:
        assert same(opened.read("block-0000"), finished())


def test_drafts_of_killed_runs_are_removed(folder):
    with Journal.open(folder, MANIFEST, "2:4") as opened:
        opened.write("block-0000", finished())
    (folder / ".block-0001.safetensors.77.part").write_bytes(b"half")
    (folder / ".out-x1.part" / "out").mkdir(parents=True)
    with Journal.open(folder, MANIFEST, "2:4"):
        pass
    assert names(folder) == {"manifest.json", "block-0000.safetensors"}


def test_removing_leaves_no_trace(folder):
    with Journal.open(folder, MANIFEST, "2:4") as opened:
        opened.write("block-0000", finished())
        opened.write("head", finished(1))
        opened.remove()
    assert not folder.exists()


class Killed(BaseException):
    """Ends everything at once."""


@pytest.mark.parametrize("at", range(4))
def test_whatever_a_kill_leaves_of_a_journal_that_is_removed_does_not_block_another_run(at, folder, monkeypatch):
    left = [at]

    def remove_or_die(path: Path) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        path.unlink(missing_ok=True)

    with Journal.open(folder, MANIFEST, "2:4") as opened:
        opened.write("block-0000", finished())
        opened.write("head", finished(1))
        with monkeypatch.context() as patch:
            patch.setattr(journals, "remove", remove_or_die)
            if at < 3:
                with pytest.raises(Killed):
                    opened.remove()
            else:
                opened.remove()
    assert (folder / "manifest.json").exists() == (at < 3)
    remove_leftover(folder, MANIFEST)
    assert not folder.exists()


@pytest.mark.parametrize("left", [".x.9.part", "lock", "writer.json"])
def test_a_journal_without_manifest_is_begun_anew(left, folder):
    folder.mkdir()
    (folder / left).write_bytes(b"left by a kill")
    with Journal.open(folder, {**MANIFEST, "model": "5f"}, "2:4") as opened:
        assert names(folder) == {"manifest.json", "lock", "writer.json"}
        assert opened.read("block-0003") is None


@pytest.mark.parametrize(
    "theirs", ["thesis.txt", "model.safetensors", "blockade-1.safetensors", "lora-000010.safetensors", ".hidden"]
)
def test_foreign_files_are_kept(theirs, folder):
    folder.mkdir()
    (folder / theirs).write_text("years of work")
    (folder / "block-0000.safetensors").write_text("of a journal")
    remove_leftover(folder, MANIFEST)
    with pytest.raises(DifferentRun, match=re.escape(str(folder)) + ".*holds no journal of armorfact"):
        Journal.open(folder, MANIFEST, "2:4")
    assert names(folder) == {theirs, "block-0000.safetensors"}


@pytest.mark.parametrize("manifest", [{**MANIFEST, "model": "5f"}, None])
def test_the_journal_of_another_run_is_not_a_leftover_of_this_one(manifest, folder):
    with Journal.open(folder, MANIFEST, "2:4") as opened:
        opened.write("block-0000", finished())
    if manifest is None:  # damaged: whose it is cannot be known
        (folder / "manifest.json").write_text("{")
    remove_leftover(folder, manifest or MANIFEST)
    assert (folder / "block-0000.safetensors").exists()


def test_removing_a_journal_keeps_what_someone_else_put_there(folder):
    with Journal.open(folder, MANIFEST, "2:4") as opened:
        (folder / "thesis.txt").write_text("years of work")
        opened.remove()
    assert names(folder) == {"thesis.txt"}


def test_a_journal_of_another_run_is_refused_and_left_as_it_is(folder):
    with Journal.open(folder, MANIFEST, "2:4") as opened:
        opened.write("block-0000", finished())
    with pytest.raises(DifferentRun, match='model: "5e" there, "5f" now'):
        Journal.open(folder, {**MANIFEST, "model": "5f"}, "2:4")
    assert names(folder) == {"manifest.json", "block-0000.safetensors"}


# Single layers of a block


def single(place: int) -> Finished:
    """One of the two layers of `finished`."""
    return Finished([finished().layers[place]], 0.5 + place)


def test_single_layers_are_read_in_order_and_go_when_their_block_is_finished(journal):
    journal.write(layer_key("block-0001", 0), single(0))
    journal.write(layer_key("block-0000", 1), single(1))
    journal.write(layer_key("block-0000", 0), single(0))
    found = journal.layers_of("block-0000")
    assert all(map(same, found, [single(0), single(1)])) and len(found) == 2
    journal.write("block-0000", finished())
    assert journal.layers_of("block-0000") == [] and same(journal.read("block-0000"), finished())
    assert len(journal.layers_of("block-0001")) == 1
    journal.remove()
    assert names(journal.folder) == {"lock", "writer.json"}


def test_single_layers_that_a_kill_left_beside_their_block_go(folder, monkeypatch):
    with Journal.open(folder, MANIFEST, "2:4") as opened:
        opened.write(layer_key("block-0000", 0), single(0))
        with monkeypatch.context() as patch:
            patch.setattr(journals, "remove", lambda path: None)
            opened.write("block-0000", finished())
        opened.write(layer_key("block-0001", 1), single(1))
    assert "block-0000-layer-0000.safetensors" in names(folder)
    with Journal.open(folder, MANIFEST, "2:4"):
        pass
    assert names(folder) == {"manifest.json", "block-0000.safetensors", "block-0001-layer-0001.safetensors"}


@pytest.mark.parametrize("damage", ["cut short", "exchanged"])
def test_a_damaged_single_layer_is_named(damage, journal):
    for place in range(2):
        journal.write(layer_key("block-0000", place), single(place))
    first, second = (journal.folder / f"{layer_key('block-0000', place)}.safetensors" for place in range(2))
    first.write_bytes(first.read_bytes()[:-1] if damage == "cut short" else second.read_bytes())
    told = re.escape(str(first)) + r" is damaged \(.*\); delete that one file, and its layer is pruned again"
    with pytest.raises(ValueError, match=told):
        journal.layers_of("block-0000")
    first.unlink()
    assert [x.seconds for x in journal.layers_of("block-0000")] == [1.5]


def test_prices_are_kept_exactly_and_a_damaged_file_of_them_is_named(journal):
    kept = Finished([], 2.5, prices={"a.b": 0.1 + 0.2, "a.c": 1e-9})
    journal.write(PRICES, kept)
    assert journal.read(PRICES) == kept
    assert journal.tensors() == {}
    path = journal.folder / f"{PRICES}.safetensors"
    path.write_bytes(path.read_bytes().replace(b"1e-09", b"1e-08"))
    with pytest.raises(ValueError, match=r"is damaged \(.*\); delete that one file, and prices are found again"):
        journal.read(PRICES)


def test_a_folder_that_its_writer_takes_away_meanwhile_is_nobodys(tmp_path, monkeypatch):
    listed = iter([{"block-0000.safetensors"}, set()])
    monkeypatch.setattr(manifest, "_foreign_to", lambda folder: next(listed))
    refuse_foreign(tmp_path, "journal")
    listed = iter([{"theirs"}, {"theirs"}])
    with pytest.raises(DifferentRun, match="holds no journal"):
        refuse_foreign(tmp_path, "journal")


def test_a_run_of_an_earlier_version_that_noted_less_is_told_so(folder):
    with pytest.raises(DifferentRun, match=r"is of an earlier version of armorfact, .*pruned_config: null there"):
        check_same(MANIFEST, {**MANIFEST, "pruned_config": "5f"}, folder)
    with pytest.raises(DifferentRun, match="belongs to another run"):
        check_same({**MANIFEST, "model": "other"}, {**MANIFEST, "pruned_config": "5f"}, folder)
