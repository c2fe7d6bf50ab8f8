"""The journal of a run: what it tells of damage, of files in the wrong place, and what a kill may leave of it."""

from __future__ import annotations

import json
import random
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from armorfact_hf.files import DiskFull
from armorfact_hf.layers.linear import FactorizedLinear
from armorfact_hf.pruning import journal as journals
from armorfact_hf.pruning.journal import DifferentRun, Finished, Journal, model_fingerprint, remove_leftover
from armorfact_hf.pruning.layer import LayerReport
from armorfact_hf.pruning.seal import BLANK, seal

MANIFEST = {"config.pattern": "2:4", "model": "5e", "layers": ["a.b", "a.c"]}
D_OUT, D_IN, BLOCK = 8, 16, (4, 8)


def finished(seed: int = 0, bias: bool = True) -> Finished:
    """A decoder block of two random pruned layers."""
    source = torch.Generator().manual_seed(seed)
    layers = []
    for name in ("a.b", "a.c"):
        layer = FactorizedLinear(D_OUT, D_IN, block=BLOCK, bias=bias, dtype=torch.bfloat16)
        floats = {part: torch.randn(x.shape, generator=source) for part, x in layer.state_dict().items()}
        floats["positions"] = torch.full_like(layer.positions, 0b0100_0100)  # the first two of each group
        layer.load_state_dict(floats)
        report = LayerReport(
            name, 0, (D_OUT, D_IN), BLOCK, {"armorfact": 0.1}, 0.1, 0.2, 3, 0.5, 256, 160, 96, "converged", ("a note",)
        )
        layers.append((layer, report))
    return Finished(layers, 1.5)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "out.journal"


@pytest.fixture
def journal(folder):
    with Journal.open(folder, MANIFEST, "2:4") as opened:
        yield opened


@pytest.fixture
def stored(journal) -> Path:
    """The file of a block that was written."""
    journal.write("block-0000", finished())
    return journal.folder / "block-0000.safetensors"


def damaged(path: Path, why: str = "") -> str:
    return re.escape(f"{path} is damaged (") + f".*{why}.*" + re.escape("); delete that one file, and its decoder")


def same(first: Finished, second: Finished) -> bool:
    return first.seconds == second.seconds and all(
        report == other and layer.state_dict().keys() == state.state_dict().keys() and all(
            torch.equal(x, state.state_dict()[part]) for part, x in layer.state_dict().items()
        )
        for (layer, report), (state, other) in zip(first.layers, second.layers, strict=True)
    )  # fmt: skip


def rewrite(path: Path, block=None, tensors=None) -> None:
    """Write a file of the journal anew, sealed, with changed reports or tensors."""
    with safe_open(path, "pt") as held:
        found = json.loads(held.metadata()["block"])
    save_file(tensors or load_file(path), path, metadata={"block": json.dumps(found | (block or {})), **BLANK})
    seal(path)


@pytest.mark.parametrize("bias", [True, False])
def test_what_is_read_is_what_was_written(bias, journal):
    journal.write("head", finished(bias=bias))
    assert same(journal.read("head"), finished(bias=bias))
    assert journal.read("block-0000") is None


def test_a_block_without_layers_is_kept_too(journal):
    journal.write("block-0001", Finished([], 0.25))
    assert journal.read("block-0001") == Finished([], 0.25)


def test_every_bit_that_flips_is_told(journal, stored):
    whole = stored.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    source = random.Random(0)
    bits = [*range(64), *source.sample(range(8 * header), 300), *source.sample(range(8 * header, 8 * len(whole)), 200)]
    for bit in bits:
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        stored.write_bytes(flipped)
        with pytest.raises(ValueError, match=damaged(stored)):
            journal.read("block-0000")
    stored.write_bytes(whole)
    assert same(journal.read("block-0000"), finished())


@pytest.mark.parametrize("size", [0, 4, 8, 100, -1])
def test_a_file_that_is_cut_short_is_told(size, journal, stored):
    stored.write_bytes(stored.read_bytes()[:size])
    with pytest.raises(ValueError, match=damaged(stored)):
        journal.read("block-0000")


def test_exchanged_files_are_told(journal, stored):
    journal.write("block-0001", finished(1))
    other = stored.with_name("block-0001.safetensors")
    shutil.copy(other, stored)
    with pytest.raises(ValueError, match=damaged(stored, "it is block-0001 under another name")):
        journal.read("block-0000")


def test_a_file_of_another_run_is_told(journal, stored, tmp_path):
    with Journal.open(tmp_path / "other", {**MANIFEST, "model": "5f"}, "2:4") as other:
        other.write("block-0000", finished())
    shutil.copy(tmp_path / "other" / stored.name, stored)
    with pytest.raises(ValueError, match=damaged(stored, "it is of another run")):
        journal.read("block-0000")


def with_tensor(path: Path, name: str, tensor: torch.Tensor | None) -> dict[str, torch.Tensor]:
    tensors = load_file(path) | {name: tensor}
    return {key: value for key, value in tensors.items() if value is not None}


@pytest.mark.parametrize(
    ("name", "tensor", "why"),
    [
        ("a.b.values", torch.full((D_OUT, D_IN // 2), float("nan"), dtype=torch.bfloat16), "64 values that are NaN"),
        ("a.c.right", torch.full((2, 8, 8), float("inf"), dtype=torch.bfloat16), "128 values that are NaN or inf"),
        ("a.b.positions", torch.zeros(D_OUT, 2, dtype=torch.uint8), "a position occurs twice"),
        ("a.b.left", torch.zeros(2, 4, 4), "expected BF16"),
        ("a.b.left", torch.zeros(4, 4, 2, dtype=torch.bfloat16), "has shape"),
        ("a.b.left", None, "lack a.b.left"),
        ("a.b.x", torch.zeros(2), "unexpected"),
        ("a.d.values", torch.zeros(2), "it holds a.d.values, of which it has no report"),
    ],
)
def test_tensors_that_are_no_pruned_layer_are_told_although_sealed(name, tensor, why, journal, stored):
    rewrite(stored, tensors=with_tensor(stored, name, tensor))
    with pytest.raises(ValueError, match=damaged(stored, re.escape(why))) as told:
        journal.read("block-0000")
    assert "copy or download" not in str(told.value)


def test_a_report_that_is_dropped_is_told(journal, stored):
    [_, (_, second)] = finished().layers
    rewrite(stored, {"reports": [second.to_dict()]})
    with pytest.raises(ValueError, match=damaged(stored, r"it holds a\.b\.bias, .* of which it has no report")):
        journal.read("block-0000")


@pytest.mark.parametrize("block", [{"reports": 1}, {"reports": [{}]}, {"seconds": "x"}, {"key": None}, {"run": 1}])
def test_a_header_of_the_wrong_form_is_told(block, journal, stored):
    rewrite(stored, block)
    with pytest.raises(ValueError, match=damaged(stored)):
        journal.read("block-0000")


def test_a_file_without_digest_is_told(journal, stored):
    save_file(load_file(stored), stored)
    with pytest.raises(ValueError, match=damaged(stored, "it holds no sha256")):
        journal.read("block-0000")


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        OSError(122, "Disk quota exceeded"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_disk_that_is_full_in_mid_run_is_told_and_nothing_is_lost(error, journal, stored, monkeypatch):
    def save(*_, **__):
        raise error

    monkeypatch.setattr(journals, "save_file", save)
    told = r"block-0001\.safetensors could not be written: it needs 0\.0 MB, [\d,.]+ MB are free now; make room, and"
    with pytest.raises(DiskFull, match=told):
        journal.write("block-0001", finished(1))
    assert journal.read("block-0001") is None and same(journal.read("block-0000"), finished())


def test_other_failures_to_write_stay_what_they_are(journal, monkeypatch):
    def save(*_, **__):
        raise SafetensorError("Error while serializing: I/O error: Input/output error (os error 5)")

    monkeypatch.setattr(journals, "save_file", save)
    with pytest.raises(SafetensorError, match="os error 5"):
        journal.write("block-0001", finished(1))


# What kills leave


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
    remove_leftover(folder)
    assert not folder.exists()


@pytest.mark.parametrize("left", ["block-0003.safetensors", "head.safetensors", ".x.9.part", "lock", "writer.json"])
def test_a_journal_without_manifest_of_our_own_files_is_begun_anew(left, folder):
    folder.mkdir()
    (folder / left).write_bytes(b"left by a kill")
    with Journal.open(folder, {**MANIFEST, "model": "5f"}, "2:4") as opened:
        assert names(folder) == {"manifest.json", "lock", "writer.json"}
        assert opened.read("block-0003") is None


@pytest.mark.parametrize("theirs", ["thesis.txt", "model.safetensors", "blockade-1.safetensors", ".hidden"])
def test_foreign_files_are_kept(theirs, folder):
    folder.mkdir()
    (folder / theirs).write_text("years of work")
    (folder / "block-0000.safetensors").write_text("of a journal")
    remove_leftover(folder)
    with pytest.raises(DifferentRun, match=re.escape(str(folder)) + ".*holds no journal of armorfact"):
        Journal.open(folder, MANIFEST, "2:4")
    assert names(folder) == {theirs, "block-0000.safetensors"}


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


# Fingerprints


@pytest.mark.parametrize("shape", [(1, 1), (1,), (0,), ()])
def test_models_with_tensors_of_odd_strides_have_fingerprints(shape):
    model = torch.nn.Module()
    strided = torch.ones(()).as_strided(shape, tuple(5 for _ in shape))
    model.register_buffer("x", strided)
    other = torch.nn.Module()
    other.register_buffer("x", strided.clone())
    assert model_fingerprint(model) == model_fingerprint(other)
    other.x = other.x.to(torch.float64)
    assert model_fingerprint(model) != model_fingerprint(other)
