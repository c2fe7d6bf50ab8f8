"""States in files: what was put there comes back, copies go their own ways, and nothing is left."""

from __future__ import annotations

import pytest
import torch

from armorfact_hf.model.moments import Inputs, Statistics
from armorfact_hf.pruning.config import PruneConfig
from armorfact_hf.pruning.prune import prune_
from armorfact_hf.pruning.spilled import nowhere, set_aside
from tests.hf.models import random_tokens, tiny_model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_states_come_back_and_go_with_the_last_copy(dtype, tmp_path):
    first, other = (torch.randn(1, 5, 8).to(dtype) for _ in range(2))
    held = nowhere(3, tmp_path)
    assert len(held) == 3 and held[1] is None
    held[1] = first
    copy = held.copy()
    held[1] = other
    assert torch.equal(copy[1], first) and torch.equal(held[1], other)
    assert len(list(tmp_path.iterdir())) == 2
    del copy
    assert len(list(tmp_path.iterdir())) == 1
    del held
    assert not list(tmp_path.iterdir())


def test_statistics_that_wait_are_the_same(tmp_path):
    seen = Statistics()
    inputs = Inputs()
    inputs.see("a", x := torch.randn(1, 6, 4))
    inputs.see("b", x)
    seen.add(inputs)
    waiting = set_aside(seen, tmp_path)
    for name in "ab":
        assert torch.equal(waiting.of(name).gram, seen.of(name).gram) and waiting.of(name).cross is None
    assert set_aside(seen, None) is seen


@pytest.mark.parametrize("propagate", ["pruned", "dense"])
def test_a_run_whose_states_are_on_disk_gives_the_same_weights(propagate, tmp_path):
    config = PruneConfig(sweeps=1, passes=1, tail=2, propagate=propagate, baselines=())
    found = []
    for states in ("memory", "disk"):
        model = tiny_model("llama")
        prune_(model, random_tokens(), config, states=states, journal=tmp_path / states)
        found.append(model.state_dict())
        assert not list((tmp_path / states).glob(".*"))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
