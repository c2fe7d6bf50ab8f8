"""Families that transformers saves under other names than their layers have in the model."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from armorfact_hf.checkpoint.folder import load_pruned, stored_tensors
from armorfact_hf.runs.export import export_dense
from tests.hf.models import RENAMED, random_tokens
from tests.hf.runs.folders import OURS, prune, saved, silent

pytestmark = pytest.mark.usefixtures("own_cache")


def stored(folder):
    return {name for name, _ in stored_tensors(folder)}


@pytest.mark.parametrize("stream", [False, True], ids=["memory", "stream"])
@pytest.mark.parametrize("family", RENAMED)
def test_they_are_pruned_loaded_saved_again_and_exported(family, stream, text_file, out, tmp_path):
    dense, tokens = as_on_the_hub(saved(family, tmp_path / family)), random_tokens()
    report = prune(dense, out, text_file, OURS, stream=stream)
    model = load_pruned(out)
    logits = model(tokens).logits
    assert {f"{layer.name}.values" for layer in report.layers} <= stored(out)
    assert {name for name in stored(out) if "vision" in name} == {name for name in stored(dense) if "vision" in name}
    assert not {layer.name + ".weight" for layer in report.layers} & stored(dense)
    model.save_pretrained(tmp_path / "again")
    assert stored(tmp_path / "again") == stored(out)
    assert torch.equal(load_pruned(tmp_path / "again")(tokens).logits, logits)
    export_dense(out, tmp_path / "exported", silent)
    assert stored(tmp_path / "exported") == stored(dense)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    torch.testing.assert_close(exported(tokens).logits, logits, rtol=1e-5, atol=1e-5)


def as_on_the_hub(folder):
    """With the names of a vision tower as checkpoints have them that were not saved by today's transformers."""
    tensors = {name.replace("vision_tower.", "vision_tower.vision_model."): x for name, x in stored_tensors(folder)}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder
