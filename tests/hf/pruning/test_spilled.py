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
    dense = Inputs()
    for name in "ab":
        dense.see(name, x + 1)
    seen.add(inputs)
    waiting = set_aside(seen, tmp_path)
    for name in "ab":
        assert torch.equal(waiting.of(name).gram, seen.of(name).gram) and waiting.of(name).cross is None
    seen = Statistics()
    seen.add(inputs, dense)
    waiting = set_aside(seen, tmp_path)
    for name in "ab":
        assert torch.equal(waiting.of(name).cross, seen.of(name).cross)
    assert set_aside(seen, None) is seen


@pytest.mark.parametrize(
    "settings",
    [{}, {"propagate": "dense"}, {"target": "output"}, {"target": "output", "core_dtype": "int8"}],
    ids=["pruned", "dense", "output", "output in int8"],
)
def test_a_run_whose_states_are_on_disk_gives_the_same_weights(settings, tmp_path):
    config = PruneConfig(sweeps=1, passes=1, tail=2, baselines=(), **settings)
    found, losses = [], []
    for states in ("memory", "disk"):
        model = tiny_model("llama")
        report = prune_(model, random_tokens(), config, states=states, journal=tmp_path / states)
        found.append(model.state_dict())
        losses.append([(layer.losses, layer.objective_loss) for layer in report.layers])
        assert not list((tmp_path / states).glob(".*"))
    assert losses[0] == losses[1]
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
