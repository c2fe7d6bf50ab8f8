"""Devices that are not there are told before anything is read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from armorfact_hf.data.load_model import load_model, open_model


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
