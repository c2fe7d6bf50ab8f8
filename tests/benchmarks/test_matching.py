"""Optimizers of matching side by side: each runs, PyTorch's steps are PyTorch's, and none stays behind."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from armorfact_hf import PruneConfig
from armorfact_hf.pruning.prune import prune_
from armorfact_hf.pruning.tuning import matching, muon
from benchmarks.matching import FORMS, AdamW, tuned_by
from tests.hf.models import random_tokens, tiny_model


def test_each_form_tunes_a_block_and_leaves_nothing_behind():
    config, found = PruneConfig(include=(r"re:.*layers\.1\..*",), baselines=(), tail=0, sweeps=2), {}
    for form, how in FORMS.items():
        with tuned_by(*how):
            [report] = prune_(tiny_model("llama"), random_tokens(), config).blocks
        found[form] = report.after
        assert matching.Muon is muon.Muon and muon.TILE == 64
        assert muon._side(128) == 64
    assert found["Muon"] not in (found["AdamW"], found["Muon, tiles of 16"])


def test_a_step_of_adam_is_pytorchs_and_can_be_taken_back():
    start, gradient = torch.linspace(-1, 1, 6).reshape(2, 3), torch.arange(6.0).reshape(2, 3) - 2
    theirs = nn.Parameter(start.clone())
    theirs.grad = gradient.clone()
    torch.optim.AdamW([theirs], lr=0.1 * muon.unit(start), betas=(0.9, 0.95), weight_decay=0.0).step()
    ours = AdamW({"x": nn.Parameter(start.clone())})
    ours.gradients["x"].copy_(gradient)
    ours.step_(0.1)
    torch.testing.assert_close(ours.parameters["x"], theirs)
    ours.undo_()
    assert torch.equal(ours.parameters["x"].detach(), start)


@pytest.mark.parametrize("size", [1, 7, 96, 128])
def test_a_tile_of_whole_factors_is_the_factor(size):
    with tuned_by(*FORMS["Muon, whole factors"]):
        assert muon._side(size) == size
