"""The plan says beforehand what pruning then does."""

from __future__ import annotations

import gc
import weakref
from dataclasses import astuple

import pytest
import torch

from armorfact_hf.cli.tables import plan_lines
from armorfact_hf.pruning import estimate
from armorfact_hf.pruning.config import PruneConfig
from armorfact_hf.pruning.job import make_job
from armorfact_hf.pruning.memory import memory_of
from armorfact_hf.pruning.plan import make_plan
from armorfact_hf.pruning.prune import prune_, prune_job_
from armorfact_hf.pruning.states import States
from armorfact_hf.pruning.workers.cluster_memory import cluster_memory
from tests.hf.models import BLOCKS, random_tokens, tiny_model
from tests.hf.observers import Stepping


@pytest.mark.parametrize(
    "settings",
    [{"sweeps": 1}, {"method": "wanda"}, {"sweeps": 1, "block": 8, "pattern": "1:4"}, {"sweeps": 1, "head": True}],
)
def test_bytes_are_those_of_the_pruned_layers(settings):
    config = PruneConfig(**settings, baselines=())
    model = tiny_model("llama", dtype=torch.bfloat16)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plan = make_plan(model, random_tokens(), config)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    report = prune_(model, random_tokens(), config)
    assert [(x.name, x.shape, x.block, x.dense_bytes, x.bytes) for x in plan.layers] == [
        (x.name, x.shape, x.block, x.dense_bytes, x.bytes) for x in report.layers
    ]
    assert plan.bytes == sum(layer.bytes for layer in report.layers)
    assert plan.seconds > 0 and plan.peak_bytes > plan.model_bytes


@pytest.mark.parametrize(
    ("family", "block"), [("llama", "auto"), ("llama", "priced"), ("gpt2", "auto"), ("mixtral", "auto")]
)
def test_a_finished_block_takes_the_memory_of_its_pruned_layers_alone(family, block):
    """Or the plan would have to count every pruned layer beside the whole dense model."""
    model = tiny_model(family)
    job = make_job(model, random_tokens(), PruneConfig(block=block, sweeps=1, baselines=(), tail=1))
    own = job.layers[0]
    held, weight = own.module, own.weight.clone()  # somebody else's reference to a dense layer
    modules = {id(x): x for layer in job.layers[1:] for x in (layer.module, getattr(layer.module, "stacked", None))}
    dense = [weakref.ref(x) for x in modules.values() if isinstance(x, torch.nn.Module) and x is not held]
    del own, modules
    alive = []

    def look(step):
        if step.done < step.total:
            alive.append(sum(module() is not None for module in dense))

    prune_job_(job, None, Stepping(look))
    gc.collect()
    assert not any(module() is not None for module in dense)
    assert min(alive) < len(dense) / 2  # and not only at the end
    assert torch.equal(held.weight.T if family == "gpt2" else held.weight, weight)
    assert job.layers[0].shape == weight.shape and job.layers[0].weight.is_meta


@pytest.mark.parametrize(
    "settings",
    [
        {"tail": 2},
        {"tail": 0},
        {"tail": 2, "propagate": "dense"},
        {"refine": None},
        {"refine": None, "propagate": "dense"},
    ],
    ids=str,
)
def test_states_are_there_as_often_as_planned(settings, monkeypatch):
    job = make_job(tiny_model("llama"), random_tokens(), PruneConfig(sweeps=1, baselines=(), **settings))
    most, made, init = 0, [], States.__init__

    def noted(self, *arguments, **named):
        init(self, *arguments, **named)
        made.append(weakref.ref(self))

    def look(step):
        nonlocal most
        there = [states().hidden for states in made if states() is not None]
        tensors = {id(x): x for hidden in there for x in hidden if x is not None}
        most = max(most, sum(x.nbytes for x in tensors.values()))

    monkeypatch.setattr(States, "__init__", noted)
    prune_job_(job, None, Stepping(look))
    assert job.states_bytes - job.window_bytes <= most <= job.states_bytes


def test_wrapper_overhead():
    plan = make_plan(tiny_model("llama"), random_tokens(), PruneConfig(include=("q_proj",), block=8), measure=False)
    assert plan.wrapper_overhead == pytest.approx(8 / 32 + 8 / 32)
    assert plan.seconds is None
    assert len(plan.dense_layers) == 6 * BLOCKS


def test_blocks_that_no_cut_goes_through_and_what_they_cost():
    model = tiny_model("llama", hidden_size=256, intermediate_size=480)
    alone, shared = (
        make_plan(model, random_tokens(), PruneConfig(tensor_parallel=ranks), measure=False) for ranks in (1, 4)
    )
    assert alone.recut == {} and alone.rank_bytes == alone.bytes
    assert all(layer.uncut_block == before.block for layer, before in zip(shared.layers, alone.layers, strict=True))
    assert shared.recut and set(shared.recut) == {
        (layer.uncut_block, layer.block) for layer in shared.layers if layer.uncut_block != layer.block
    }
    for layer in shared.layers:
        assert all(size // 4 % block == 0 for size, block in zip(layer.shape, layer.block, strict=True))
    assert shared.bytes / 4 < shared.rank_bytes < shared.bytes / 2


def test_a_layer_that_cannot_be_cut_stays_dense_with_the_reason():
    model = tiny_model("llama", hidden_size=32, intermediate_size=72)
    plan = make_plan(model, random_tokens(), PruneConfig(tensor_parallel=2), measure=False)
    reasons = {layer.reason for layer in plan.dense_layers if layer.name.endswith("down_proj")}
    assert len(reasons) == 1 and "a byte of positions" in reasons.pop()
    assert all(not layer.name.endswith("down_proj") for layer in plan.layers)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_share_of_the_blocks_weights_that_stays_dense(family):
    whole = make_plan(tiny_model(family), random_tokens(2), measure=False)
    assert whole.stays_dense == 0.0 and "stay dense" not in " ".join(plan_lines(whole))
    some = make_plan(tiny_model(family), random_tokens(2), PruneConfig(include=(r"re:.*\.0\..*",)), measure=False)
    assert some.stays_dense == pytest.approx(1 - 1 / BLOCKS)


def test_weights_that_stay_dense_are_told():
    plan = make_plan(tiny_model("llama"), random_tokens(2), PruneConfig(ignore=("q_proj",)), measure=False)
    attention, mlp = 32 * 32 * 2 + 32 * 16 * 2, 3 * 32 * 64
    assert plan.stays_dense == pytest.approx(32 * 32 / (attention + mlp))
    assert f"Of the weights in the decoder blocks {100 * plan.stays_dense:.1f}% stay dense" in list(plan_lines(plan))


def test_a_plan_of_later_blocks_runs_those_before_first():
    config = PruneConfig(include=(f"re:model.layers.{BLOCKS - 1}",), sweeps=1)
    assert make_plan(tiny_model("llama"), random_tokens(), config).seconds > 0


def test_the_plan_refuses_what_pruning_would():
    with pytest.raises(ValueError, match="no layer can be pruned"):
        make_plan(tiny_model("llama"), random_tokens(), PruneConfig(block=7))


def test_the_peak_is_the_sum_of_its_parts():
    job = make_job(tiny_model("llama"), random_tokens(), PruneConfig(baselines=(), tail=1))
    memory = memory_of(job)
    assert all(astuple(memory)) and memory.peak == sum(astuple(memory))
    spread = cluster_memory(job, 3)
    assert spread.store and spread.peak == spread.leader.peak + 3 * spread.worker.peak + spread.store


def test_twice_the_windows_take_twice_as_long_and_layers_as_long_as_their_flops(monkeypatch):
    monkeypatch.setattr(estimate, "_seconds", lambda work: (work() and None) or 1.0)
    monkeypatch.setattr(estimate, "_seconds_a_flop", lambda layer, statistics, config: 0.0)
    config = PruneConfig(sweeps=1, refine=None, baselines=())
    short, long = (make_job(tiny_model("llama"), random_tokens(windows), config) for windows in (4, 8))
    assert estimate.estimated_seconds(long) == 2 * estimate.estimated_seconds(short) > 0
    flowing = estimate.estimated_seconds(short)
    monkeypatch.setattr(estimate, "_seconds_a_flop", lambda layer, statistics, config: 1.0)
    assert estimate.estimated_seconds(short) - flowing == pytest.approx(estimate._flops(short))
    wider = make_job(tiny_model("llama", intermediate_size=128), random_tokens(), config)
    assert estimate._flops(wider) > estimate._flops(short) > 0
