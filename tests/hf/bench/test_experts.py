"""Experts are timed beside the dense ones."""

from __future__ import annotations

import torch

from armorfact_hf.bench import timing
from armorfact_hf.bench.experts import time_experts
from armorfact_hf.bench.layers import choose
from armorfact_hf.cli.tables import crossovers
from armorfact_hf.pruning.config import PruneConfig
from armorfact_hf.pruning.prune import prune_
from tests.hf.models import BLOCKS, random_tokens, tiny_model


def test_each_kind_of_experts_at_each_number_of_tokens(monkeypatch):
    monkeypatch.setattr(timing, "SECONDS", 0.0)
    model = tiny_model("gpt_oss", dtype=torch.bfloat16)
    prune_(model, random_tokens(), PruneConfig(method="magnitude", baselines=()))
    found = time_experts(model, [4, 1, 4])
    assert [(x.shape, x.tokens, x.layers) for x in found] == [
        ("2 of 4 experts, 64x32", 1, BLOCKS),
        ("2 of 4 experts, 64x32", 4, BLOCKS),
    ]
    assert all(set(x.seconds) == {"dense", "experts"} and x.dense == x.seconds["dense"] > 0 for x in found)
    assert choose(found) == {}
    [sentence] = crossovers(found, {})
    assert sentence.startswith("2 of 4 experts, 64x32: ") and "chosen" not in sentence


def test_a_model_without_experts_has_none():
    assert time_experts(tiny_model("llama"), [1]) == []
