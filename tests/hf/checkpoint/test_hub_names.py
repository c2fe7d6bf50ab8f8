"""A pruned model by its name on the hub, from a stand-in for the cache of the hub's files. No network."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub.constants
import pytest
import torch

from armorfact_hf import NotPruned, PruneConfig, load_model, load_pruned, prune_
from armorfact_hf.checkpoint.folder import save_pruned
from armorfact_hf.layers.linear import FactorizedLinear
from tests.hf.models import random_tokens, tiny_model, word_tokenizer

COMMIT = "0123456789abcdef" * 2 + "01234567"


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """Where the hub's files are kept, with nothing in it, and no way to fetch more."""
    folder = tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return folder


def kept(cache: Path, name: str) -> Path:
    """The folder in which the files of a name are kept."""
    place = cache / f"models--{name.replace('/', '--')}"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text(COMMIT)
    (place / "snapshots" / COMMIT).mkdir(parents=True)
    return place / "snapshots" / COMMIT


def pruned():
    model = tiny_model("llama")
    prune_(model, random_tokens(), PruneConfig(sweeps=1, baselines=(), block=8))
    return model


@torch.no_grad()
def logits(model):
    return model(random_tokens(2, seed=1)).logits


def test_a_pruned_model_is_loaded_by_its_name(cache):
    model = pruned()
    save_pruned(model, kept(cache, "owner/pruned-1.0"), word_tokenizer())
    assert torch.equal(logits(load_pruned("owner/pruned-1.0")), logits(model))
    loaded = load_model("owner/pruned-1.0", device="cpu", log=lambda sentence: None)
    assert loaded.name == "owner/pruned-1.0" and torch.equal(logits(loaded.model), logits(model))
    assert any(isinstance(module, FactorizedLinear) for module in loaded.model.modules())


def test_a_dense_model_is_loaded_by_its_name_as_before(cache):
    model, folder = tiny_model("llama"), kept(cache, "owner/dense")
    model.save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    assert torch.equal(logits(load_model("owner/dense", device="cpu").model), logits(model))
    with pytest.raises(NotPruned, match="holds no model pruned by armorfact"):
        load_pruned("owner/dense")


def test_a_folder_goes_before_the_hub(cache, tmp_path):
    model = pruned()
    save_pruned(model, tmp_path / "owner" / "here")
    kept(cache, "owner/here")
    assert torch.equal(logits(load_pruned("owner/here")), logits(model))


def test_damage_in_the_cache_is_named(cache):
    folder = kept(cache, "owner/cut")
    save_pruned(pruned(), folder, word_tokenizer())
    (folder / "model.safetensors").unlink()
    for load in (load_pruned, lambda name: load_model(name, device="cpu")):
        with pytest.raises(ValueError, match="holds no safetensors file"):
            load("owner/cut")


def test_a_name_that_the_hub_does_not_give_is_named(cache):
    with pytest.raises(ValueError, match="'owner/nothing' is no folder, and the hub does not give it"):
        load_pruned("owner/nothing")
    with pytest.raises(ValueError, match="cannot load the model 'owner/nothing'"):
        load_model("owner/nothing", device="cpu")


@pytest.mark.parametrize("name", ["nothing", "./owner/nothing", "../nothing", "/owner/nothing", "a/b/c", "~/nothing"])
def test_what_is_no_name_on_the_hub_is_a_folder(cache, name):
    with pytest.raises(NotPruned, match="is no folder of a model"):
        load_pruned(name)
