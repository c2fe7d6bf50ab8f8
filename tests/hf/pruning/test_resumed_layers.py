"""A run that is killed in the middle of a decoder block loses no layer of it that was finished."""

from __future__ import annotations

from dataclasses import replace

import pytest

from armorfact_hf.checkpoint.fingerprint import model_fingerprint
from armorfact_hf.pruning import side_by_side
from armorfact_hf.pruning.config import PruneConfig
from armorfact_hf.pruning.job import make_job
from armorfact_hf.pruning.layer import prune_layer
from armorfact_hf.pruning.prune import prune_
from armorfact_hf.pruning.resume.journal import Journal, layer_key
from tests.hf.models import random_tokens, tiny_model
from tests.hf.observers import Stepping
from tests.hf.threads import computing_with

SETTINGS = {
    "tuned": ("llama", {"sweeps": 1, "passes": 1, "tail": 0}, "memory", 1),
    "several at once": ("llama", {"sweeps": 1, "refine": None}, "memory", 3),
    "states on disk": ("llama", {"sweeps": 1, "target": "output", "refine": None}, "disk", 1),
    "one shot": ("falcon", {"method": "wanda"}, "memory", 1),
    "experts": ("mixtral", {"sweeps": 1, "refine": None}, "memory", 1),
}


class Killed(Exception):
    """Ends a run."""


@pytest.fixture
def pruned(monkeypatch) -> list[str]:
    """The names of the layers that are pruned, not read back."""
    names = []

    def noted(layer, *arguments):
        names.append(layer.name)
        return prune_layer(layer, *arguments)

    monkeypatch.setattr(side_by_side, "prune_layer", noted)
    return names


@pytest.mark.parametrize(("family", "changes", "states", "threads"), SETTINGS.values(), ids=SETTINGS)
def test_finished_layers_are_read_back(family, changes, states, threads, pruned, tmp_path):
    config = PruneConfig(**changes, baselines=())

    def run(act=lambda step: None, journal=None) -> tuple:
        model = tiny_model(family)
        report = prune_(model, random_tokens(), config, states=states, journal=journal, observer=Stepping(act))
        return model_fingerprint(model), [layer.losses for layer in report.layers], report.blocks

    with computing_with(threads):
        whole, every = run(), sorted(pruned)
        second_block = {name for name in every if ".1." in name.partition("experts")[0]}
        pruned.clear()

        def die_after_a_layer(step) -> None:
            if step.doing in second_block:
                raise Killed

        for _ in range(2):
            with pytest.raises(Killed):
                run(die_after_a_layer, tmp_path)
        kept = {path.stem for path in tmp_path.glob("block-*")}
        steps = []
        assert run(steps.append, tmp_path) == whole
    assert "block-0000" in kept and sum(key.startswith("block-0001-layer-") for key in kept) == 2
    assert sum(step.doing.endswith("is finished already") for step in steps) == 3
    assert steps[-1].done == steps[-1].total
    if threads == 1:  # several prune others meanwhile, which are lost
        assert sorted(pruned) == every


def test_the_seconds_of_a_block_that_was_at_work_count(tmp_path):
    config, tokens = PruneConfig(method="wanda", baselines=()), random_tokens()

    def die(step) -> None:
        if step.doing == "model.layers.0.mlp.gate_proj":
            raise Killed

    with computing_with(1), pytest.raises(Killed):
        prune_(tiny_model("llama"), tokens, config, journal=tmp_path, observer=Stepping(die))
    with Journal.open(tmp_path, make_job(tiny_model("llama"), tokens, config).manifest, "2:4") as journal:
        [*_, last] = journal.layers_of("block-0000")
        journal.write(layer_key("block-0000", 4), replace(last, seconds=1e6))
    for _ in range(2):  # the second time, the block is finished
        report = prune_(tiny_model("llama"), tokens, config, journal=tmp_path)
        assert 1e6 < report.seconds < 1.001e6
