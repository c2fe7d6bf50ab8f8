"""A config.json that does not say what the files hold, or says it twice, is refused at every door."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from armorfact_hf import PruneConfig, inspect_folder, load_model, load_pruned, prune_
from armorfact_hf.checkpoint.config_file import read_config
from armorfact_hf.checkpoint.folder import save_pruned
from tests.hf.models import random_tokens, tiny_model, word_tokenizer

DOORS = {
    "load_pruned": load_pruned,
    "from_pretrained": AutoModelForCausalLM.from_pretrained,
    "load_model": lambda folder: load_model(str(folder), log=lambda sentence: None),
    "inspect": inspect_folder,
}
NESTED = {
    "lists": '{"a": ' + "[" * 100_000 + "]" * 100_000 + "}",
    "objects": '{"a": ' * 100_000 + "1" + "}" * 100_000,
    "somewhat": '{"a": ' * 500 + "1" + "}" * 500,
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("config") / "pruned"
    model = tiny_model("llama")
    prune_(model, random_tokens(), PruneConfig(sweeps=1, baselines=(), block=8))
    save_pruned(model, folder, word_tokenizer())
    return folder


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(saved, tmp_path / "pruned"))


def changed(folder: Path, change) -> None:
    """Rewrite config.json, given what is under ``quantization_config``."""
    found = json.loads((folder / "config.json").read_text())
    change(found["quantization_config"])
    (folder / "config.json").write_text(json.dumps(found))


def without_a_module(found: dict) -> None:
    del found["modules"][3]


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("guarded", [True, False])
def test_a_pruned_layer_that_is_not_listed_is_refused(folder, door, guarded):
    """Else transformers would make that layer anew, with random weights, and only warn."""

    def change(found):
        without_a_module(found)
        if not guarded:
            del found["sha256"]

    name = json.loads((folder / "config.json").read_text())["quantization_config"]["modules"][3]["name"]
    changed(folder, change)
    with pytest.raises(ValueError, match=rf"hold {name}\.values and {name}\.positions, .* does not list under modules"):
        DOORS[door](folder)


@pytest.mark.parametrize("door", DOORS)
def test_a_layer_that_only_the_digests_know_is_refused(folder, door):
    name = json.loads((folder / "config.json").read_text())["quantization_config"]["modules"][3]["name"]
    changed(folder, without_a_module)
    tensors = load_file(folder / "model.safetensors")
    kept = {key: tensor for key, tensor in tensors.items() if not key.startswith(f"{name}.")}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=rf"hold {name}\.values and {name}\.positions"):
        DOORS[door](folder)


def test_tensors_of_such_names_alone_are_no_pruned_layer(folder):
    """A dense module may well have something that it calls positions."""
    tensors = load_file(folder / "model.safetensors") | {
        "other.positions": torch.zeros(3),
        "more.values": torch.ones(3),
    }
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert inspect_folder(folder)


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("key", ["model_type", "modules", "version", "name"])
def test_a_key_that_is_there_twice_is_refused(folder, door, key):
    text = (folder / "config.json").read_text()
    place = text.index(f'"{key}":')
    value = json.dumps(json.JSONDecoder().raw_decode(text[place + len(key) + 3 :].lstrip())[0])
    (folder / "config.json").write_text(f'{text[:place]}"{key}": {value}, {text[place:]}')
    assert json.loads((folder / "config.json").read_text()) == json.loads(text)
    with pytest.raises(ValueError, match=f"config.json is damaged .the key '{key}' is there twice"):
        DOORS[door](folder)


@pytest.mark.parametrize("door", [door for door in DOORS if door != "from_pretrained"])
@pytest.mark.parametrize("nested", NESTED)
def test_a_config_that_is_nested_too_deeply_is_refused_in_a_sentence(folder, door, nested):
    (folder / "config.json").write_text(NESTED[nested])
    with pytest.raises(ValueError, match=r"config\.json is damaged .it is nested too deeply.: copy or download"):
        DOORS[door](folder)


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize(
    ("key", "value"),
    [("transformers_weights", "other.safetensors"), ("configuration_files", ["config.5.0.0.json"])],
)
def test_a_config_that_sends_transformers_to_other_files_is_refused(folder, door, key, value):
    shutil.copy(folder / "model.safetensors", folder / "other.safetensors")
    found = json.loads((folder / "config.json").read_text())
    (folder / "config.5.0.0.json").write_text(json.dumps(found))
    (folder / "config.json").write_text(json.dumps(found | {key: value}))
    with pytest.raises(ValueError, match=f"{key} names other files to load"):
        DOORS[door](folder)


@pytest.mark.parametrize("door", [door for door in DOORS if door != "from_pretrained"])
def test_an_adapter_in_the_folder_is_refused(folder, door):
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(ValueError, match=r"holds an adapter beside the model .adapter_config\.json."):
        DOORS[door](folder)


@pytest.mark.parametrize("redirection", ["transformers_weights", "configuration_files"])
def test_a_dense_model_that_sends_transformers_to_other_files_is_refused(tmp_path, redirection):
    tiny_model("llama").save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    found = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(found | {redirection: "adapter_model.bin"}))
    with pytest.raises(ValueError, match=f"{redirection} names other files to load"):
        load_model(str(tmp_path), log=lambda sentence: None)


@pytest.mark.parametrize("door", ["load_pruned", "from_pretrained", "load_model"])
def test_sizes_that_the_files_do_not_have_are_refused_before_there_is_room_for_them(folder, door):
    """On the meta device a model of any size is built; only what the files hold is made."""
    found = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(found | {"vocab_size": 10**12}))
    with pytest.raises(ValueError, match=r"has the shape \[\d+, \d+\], and config\.json asks for \[1000000000000, "):
        DOORS[door](folder)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"3", b"\xff\xfe", b'{"a": ' + b"9" * 5000 + b"}"])
def test_what_is_no_object_is_refused(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"config\.json is damaged"):
        read_config(tmp_path / "config.json")


def test_what_is_right_is_read_as_python_reads_it(saved):
    assert read_config(saved / "config.json") == json.loads((saved / "config.json").read_text())
