"""Pruned experts are recovered with all other layers."""

from __future__ import annotations

import torch

from armorfact_hf.layers.experts import FactorizedExperts
from armorfact_hf.pruning.config import PruneConfig
from armorfact_hf.pruning.prune import prune_
from armorfact_hf.recovery.recover import recover_
from armorfact_hf.recovery.settings import RecoverySettings
from armorfact_hf.recovery.trainable import train_factors_
from tests.hf.models import random_tokens, tiny_model

TOKENS = random_tokens(6)


def pruned() -> torch.nn.Module:
    model = tiny_model("gpt_oss", dtype=torch.bfloat16)
    prune_(model, TOKENS, PruneConfig(sweeps=1, refine=None, baselines=()))
    return model


def test_the_factors_of_experts_are_trained_and_their_supports_kept():
    model = pruned()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = recover_(
        model, TOKENS, tiny_model("gpt_oss", dtype=torch.bfloat16), RecoverySettings(steps=10, rate=1e-3, warm_up=2)
    )
    assert report.after < report.before
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    experts = {name.rpartition("experts.")[2] for name in changed if ".experts." in name}
    assert {"gate.values", "up.left", "down.right", "down.bias"} <= experts
    assert not any(name.endswith("positions") or ".router." in name for name in changed)
    assert any(isinstance(module, FactorizedExperts) for module in model.modules())


def test_a_trainer_may_have_them():
    model = train_factors_(pruned(), "wrappers")
    asking = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name.rpartition(".")[2] for name in asking} == {"left", "right"}
    assert "model.layers.0.mlp.experts.down.left" in asking
