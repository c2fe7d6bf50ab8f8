"""What tells one model from another."""

from __future__ import annotations

import pytest
import torch

from armorfact_hf.checkpoint.fingerprint import model_fingerprint


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
