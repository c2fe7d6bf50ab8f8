"""Devices that are not there are told before anything is read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from armorfact_hf.data.load_model import load_model


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
