"""A file of a journal: what it tells of damage, of other files in its place, and of a disk that is full."""

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
from armorfact_hf.pruning.resume import seal
from armorfact_hf.pruning.resume.entry import Finished
from armorfact_hf.pruning.resume.journal import Journal
from armorfact_hf.pruning.resume.seal import save_sealed
from armorfact_hf.typed_json import to_json
from tests.hf.pruning.entries import D_IN, D_OUT, MANIFEST, finished, same


def damaged(path: Path, why: str = "") -> str:
    return re.escape(f"{path} is damaged (") + f".*{why}.*" + re.escape("); delete that one file, and its decoder")


def rewrite(path: Path, block=None, tensors=None) -> None:
    """Write a file of the journal anew, sealed, with changed reports or tensors."""
    with safe_open(path, "pt") as held:
        found = json.loads(held.metadata()["block"])
    save_sealed(tensors or load_file(path), path, {"block": json.dumps(found | (block or {}))})


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
    rewrite(stored, {"reports": [to_json(second)]})
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

    monkeypatch.setattr(seal, "save_file", save)
    told = r"block-0001\.safetensors could not be written: it needs 0\.0 MB, [\d,.]+ MB are free now; make room, and"
    with pytest.raises(DiskFull, match=told):
        journal.write("block-0001", finished(1))
    assert journal.read("block-0001") is None and same(journal.read("block-0000"), finished())


def test_other_failures_to_write_are_told_with_the_file(journal, monkeypatch):
    def save(*_, **__):
        raise SafetensorError("Error while serializing: I/O error: Input/output error (os error 5)")

    monkeypatch.setattr(seal, "save_file", save)
    with pytest.raises(OSError, match=r"block-0001\.safetensors could not be written: .*os error 5"):
        journal.write("block-0001", finished(1))
