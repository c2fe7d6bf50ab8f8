"""Pruned experts are recovered with all other layers."""

from __future__ import annotations

import torch

from armorfact_hf.layers.experts import FactorizedExperts
from armorfact_hf.layers.stack import FactorizedStack
from armorfact_hf.recovery.recover import recover_
from armorfact_hf.recovery.settings import RecoverySettings
from armorfact_hf.recovery.trainable import train_factors_
from tests.hf.models import random_tokens
from tests.hf.recovery.models import dense_model, pruned_model


@torch.no_grad()
def pruned() -> torch.nn.Module:
    """Experts are made too small as well, as `pruned_model` does with other layers."""
    model = pruned_model("mixtral")
    for module in model.modules():
        if isinstance(module, FactorizedStack):
            module.values.mul_(0.75)
    return model


def test_the_factors_of_experts_are_trained_and_their_supports_kept():
    model, settings = pruned(), RecoverySettings(steps=12, rate=0.004, warm_up=4, measure_every=6)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = recover_(model, random_tokens(8, seed=3), dense_model("mixtral"), settings)
    assert report.after < report.before
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    experts = {name.rpartition("experts.")[2] for name in changed if ".experts." in name}
    assert {"gate.values", "up.left", "down.right"} <= experts
    assert not any(name.endswith("positions") or ".mlp.gate." in name for name in changed)
    assert any(isinstance(module, FactorizedExperts) for module in model.modules())


def test_a_trainer_may_have_them():
    model = train_factors_(pruned(), "wrappers")
    asking = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name.rpartition(".")[2] for name in asking} == {"left", "right"}
    assert "model.layers.0.mlp.experts.down.left" in asking
