"""Devices, configs and tensors that are not there are told, before work is done with what is made in their place."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing

from armorfact_hf.data.calibration import Calibration
from armorfact_hf.data.load_model import load_model, open_model
from armorfact_hf.evaluation.measure import Evaluation, perplexity_of
from armorfact_hf.evaluation.perplexity import evaluate_perplexity
from tests.hf.runs.folders import saved


@pytest.mark.parametrize(
    ("device", "message"),
    [
        pytest.param(
            "cuda",
            "device 'cuda' cannot be used here .*: take 'cpu', or leave it out",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one"),
        ),
        ("meta", "device 'meta' holds no numbers: take 'cpu' or 'cuda'"),
        ("gpu", "device 'gpu' cannot be used here"),
    ],
)
def test_a_device_that_cannot_be_used_is_told_before_the_model_is_looked_for(device, message):
    with pytest.raises(ValueError, match=message):
        load_model("no such model", device=device)


def test_a_device_that_is_there(model_folder: Path):
    assert load_model(str(model_folder), device="cpu").model.device.type == "cpu"


@pytest.mark.parametrize("load", [load_model, open_model])
def test_code_of_a_checkpoint_is_not_run_whatever_is_answered(load, model_folder: Path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    ran = model_folder / "ran"
    (model_folder / "evil.py").write_text(f"open({str(ran)!r}, 'w')\n")
    config = json.loads((model_folder / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}}
    (model_folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="brings code of its own, and armorfact runs none"):
        load(str(model_folder))
    assert not ran.exists()


def test_a_model_in_float64_is_loaded_as_it_is_asked_for(model_folder: Path):
    assert load_model(str(model_folder), "float64").model.dtype == torch.float64


def changed(folder: Path, **entries) -> Path:
    """The folder, with these entries in its config."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | entries))
    return folder


@pytest.mark.parametrize("load", [load_model, open_model])
@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"rope_parameters": {"rope_type": "yarnx", "rope_theta": 1.0}}, "yarnx.* upgrade transformers"),
        ({"hidden_act": "sillu"}, "sillu.* upgrade transformers"),
        ({"hidden_size": "32"}, "hidden_size.*config.json is damaged"),
        ({"model_type": "t5"}, "holds no causal language model .its config is a T5Config."),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_a_config_that_transformers_cannot_follow_is_told_in_a_sentence(load, entries, message, model_folder: Path):
    with pytest.raises(ValueError, match=message):
        load(str(changed(model_folder, **entries)))


@pytest.mark.parametrize("load", [load_model, open_model])
def test_a_dense_model_without_all_its_tensors_is_refused(load, model_folder: Path):
    tensors = load_file(model_folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, model_folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks.* model\.layers\.1\.mlp\.up_proj\.weight"):
        load(str(model_folder))


def test_windows_are_cut_to_what_the_text_model_was_trained_for(tmp_path: Path):
    folder = saved("gemma3_vision", tmp_path / "model")
    assert load_model(folder).window(2048) == 64 and load_model(folder).window(48) == 48


def test_a_bos_heads_the_windows_that_are_calibrated_on_and_measured(
    model_folder: Path, text_file: Path, monkeypatch, tmp_path
):
    monkeypatch.setenv("ARMORFACT_CACHE", str(tmp_path / "cache"))
    loaded = load_model(model_folder)
    assert loaded.bos is None
    tokenizer = loaded.tokenizer
    tokenizer.bos_token = "<s>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    assert loaded.bos == 1
    tokens = Calibration(str(text_file), 4, 24).tokens(loaded, print)
    text = tokenizer(text_file.read_text(), add_special_tokens=False)["input_ids"]
    assert tokens[:, 0].tolist() == [1] * 4 and tokens[0, 1:].tolist() == text[:23]
    found = perplexity_of(loaded, Evaluation(str(text_file), 3, 24, stride=20))
    expected = evaluate_perplexity(loaded.model, torch.tensor(text), window=24, stride=20, bos=1, max_windows=3)
    assert (found.bos, found.stride, found.perplexity, found.tokens) == (1, 20, expected.value, expected.tokens)
