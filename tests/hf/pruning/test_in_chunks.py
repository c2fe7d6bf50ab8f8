"""A block's experts pruned a few at a time, as their statistics fit into memory: the same bits."""

from __future__ import annotations

import hashlib

import pytest
import torch

from armorfact_hf.cli.tables import plan_lines
from armorfact_hf.observer import Observer
from armorfact_hf.pruning import memory
from armorfact_hf.pruning.block_by_block import units
from armorfact_hf.pruning.config import PruneConfig
from armorfact_hf.pruning.estimate import _again
from armorfact_hf.pruning.job import make_job
from armorfact_hf.pruning.memory import memory_of, model_bytes
from armorfact_hf.pruning.plan import make_plan
from armorfact_hf.pruning.progress import Progress
from armorfact_hf.pruning.prune import prune_
from armorfact_hf.pruning.workers.choice import hired
from armorfact_hf.pruning.workers.in_chunks import Gatherer
from tests.hf.models import random_tokens, tiny_model

MATCHED = {"sweeps": 1, "passes": 1, "rate": 1e-3, "tail": 2}


def digest(model) -> str:
    whole = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        whole.update(name.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()


@pytest.mark.parametrize(
    ("settings", "states"),
    [
        (MATCHED, "memory"),
        (MATCHED, "disk"),
        (MATCHED | {"propagate": "dense", "tail": 0}, "memory"),
        ({"method": "sparsegpt"}, "memory"),
        (MATCHED | {"core_dtype": "int8"}, "memory"),
    ],
)
def test_the_same_bits(settings, states):
    """Layers and losses, with blocks tuned and the last ones together; the first block's router favours two experts."""
    config = PruneConfig(**settings, baselines=())
    found = []
    for at_once in (None, 1, 2, 4):
        model = tiny_model("mixtral")
        with torch.no_grad():
            model.model.layers[0].mlp.gate.weight.zero_()
        report = prune_(model, random_tokens(), config, states=states, experts_at_once=at_once)
        found.append((digest(model), [(x.name, x.losses, x.tokens, x.factorized_loss) for x in report.layers]))
    assert all(one == found[0] for one in found)


def test_one_chunk_is_in_memory_at_a_time(monkeypatch):
    job = make_job(tiny_model("mixtral"), random_tokens(), PruneConfig(sweeps=1, baselines=()), experts_at_once=1)
    passes = []
    gather = Gatherer.statistics
    monkeypatch.setattr(Gatherer, "statistics", lambda self, some: passes.append(some) or gather(self, some))
    with hired(None, job, Progress(Observer(), units(job))) as workers, torch.no_grad():
        statistics = workers.statistics(0)
        assert len(passes) == 3 and not statistics.held  # those of the first chunk came as states moved on
        assert {name.rpartition(".")[2] for name in statistics.apart.gram} == {"q_proj", "o_proj"}
        workers.prune(job.layers_of(0), statistics)
    assert len(passes) == 3 + 4 and list(statistics.held) == [3]
    assert {name.rsplit(".", 2)[1] for name in statistics.held[3].gram} == {"3"}


def test_memory_chooses_how_many_experts_are_at_work(monkeypatch):
    model, config = tiny_model("mixtral", num_local_experts=12), PruneConfig(sweeps=1, baselines=())
    job = make_job(model, random_tokens(), config)
    beside = memory_of(job).peak - memory_of(job).statistics - model_bytes(job)
    of_one = 8 * (32 * 32 + 64 * 64)
    found = {}
    for free in (10**12, beside + 20 * of_one, beside + 7 * of_one, 0):
        monkeypatch.setattr(memory, "available", lambda device, free=free: free)
        plan = make_plan(model, random_tokens(), config, measure=False)
        found[plan.experts_at_once] = plan.memory.statistics
        told = [x for x in plan_lines(plan) if f"Statistics of {plan.experts_at_once} experts at a time" in x]
        assert len(told) == (plan.experts_at_once is not None)
    assert list(found) == [None, 6, 3, 1]
    assert sorted(found.values(), reverse=True) == list(found.values())


def test_the_estimate_counts_the_further_passes():
    model, tokens, config = tiny_model("mixtral"), random_tokens(), PruneConfig(sweeps=1, baselines=())
    job = make_job(model, tokens, config, experts_at_once=1)
    assert _again(job, 4) == _again(job, None) == 0
    assert _again(job, 2) == 3 * (2 * 4 - 1)
    assert make_plan(model, tokens, config).seconds > 0


def test_no_expert_is_too_few():
    with pytest.raises(ValueError, match="experts_at_once must be 1 or more, or None to go by memory, got 0"):
        prune_(tiny_model("mixtral"), random_tokens(), experts_at_once=0)
