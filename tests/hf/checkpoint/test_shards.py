"""The folder, its index and its files are what they say."""

from __future__ import annotations

import json
import struct

import pytest

from armorfact_hf.checkpoint.shards import INDEX, shards
from armorfact_hf.checkpoint.verify import verify, verify_folder
from tests.hf.checkpoint.cases import NAME, described, random_layer, sharded, tensors_of, written


@pytest.mark.parametrize(
    "outside", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", "c:\\x", 5, [1]]
)
def test_an_index_names_files_of_its_own_folder_only(tmp_path, outside):
    names = sharded(tmp_path, tensors_of({NAME: random_layer()}))
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": names | {"model.scale": outside}}), encoding="utf-8")
    with pytest.raises(ValueError, match=rf"{INDEX} (lists .*expected names of files in its own folder|is damaged)"):
        verify_folder(tmp_path, described({NAME: random_layer()}))


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"weight_map": 3}', "[" * 100_000, "\ud800"])
def test_a_damaged_index_is_named(tmp_path, text):
    sharded(tmp_path, tensors_of({NAME: random_layer()}))
    (tmp_path / INDEX).write_bytes(text.encode(errors="surrogatepass"))
    with pytest.raises(ValueError, match=f"{INDEX} is damaged"):
        verify_folder(tmp_path, described({NAME: random_layer()}))


@pytest.mark.parametrize("change", ["moved", "listed only", "found only"])
def test_an_index_that_disagrees_with_the_files_is_refused(tmp_path, change):
    names = sharded(tmp_path, tensors_of({NAME: random_layer()}))
    other = next(file for file in names.values() if file != names["model.scale"])
    changed = {
        "moved": names | {"model.scale": other},
        "listed only": names | {"model.other": other},
        "found only": {name: file for name, file in names.items() if name != "model.scale"},
    }
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": changed[change]}), encoding="utf-8")
    name = "model.other" if change == "listed only" else "model.scale"
    with pytest.raises(ValueError, match=f"disagree on tensor {name}"):
        verify_folder(tmp_path, described({NAME: random_layer()}))


def test_a_file_of_the_index_that_is_missing_is_named(tmp_path):
    names = sharded(tmp_path, tensors_of({NAME: random_layer()}))
    (tmp_path / names["model.scale"]).unlink()
    with pytest.raises(ValueError, match=f"lacks {names['model.scale']}, which its index lists"):
        shards(tmp_path)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "n" * 300}}), encoding="utf-8")
    with pytest.raises(ValueError, match="expected names of files"):
        shards(tmp_path)


def test_a_whole_model_saved_over_a_cut_one_is_the_one_that_is_read(tmp_path):
    layers = {NAME: random_layer()}
    sharded(tmp_path, tensors_of({NAME: random_layer()}))
    written(tmp_path, tensors_of(layers), "model.safetensors")
    assert shards(tmp_path) == [tmp_path / "model.safetensors"]
    verify_folder(tmp_path, described(layers))


def test_a_folder_without_tensors_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no safetensors file"):
        shards(tmp_path)


@pytest.mark.parametrize("content", [None, b"", b"abc", b"\xff" * 64, struct.pack("<Q", 99_999_999) + b"{}"])
def test_a_file_that_is_none_is_refused(tmp_path, content):
    path = tmp_path / "model.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged or cannot be read .*download it again"):
        verify([path], described({NAME: random_layer()}))
