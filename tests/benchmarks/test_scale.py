"""The simulation of many workers: what must hold whatever the costs are, and its costs in a file."""

from __future__ import annotations

import pytest

from armorfact_hf.pruning.config import PruneConfig
from benchmarks.scale.costs import SHRINK, Costs, LayerCost
from benchmarks.scale.simulation import Run, finished

COSTS = Costs(
    "a machine", 64, 1.0, 4.0, {"q": LayerCost((8, 8), "q", 0.5, 10.0), "k": LayerCost((2, 8), "q", 0.0, 3.0)}
)


def run(workers: int, matched: bool = False, bandwidth: float = float("inf")) -> Run:
    return Run(COSTS, workers, 16, PruneConfig().matching if matched else None, bandwidth)


def test_tasks_wait_for_what_they_need_and_for_a_worker():
    ends = finished({"a": 3.0, "b": 2.0, "c": 1.0}, {"a": 0.0, "b": 0.0, "c": 0.0}, 2)
    assert ends == {"a": 3.0, "b": 2.0, "c": 3.0}
    assert finished({"a": 1.0}, {"a": 5.0}, 2) == {"a": 6.0}


def test_one_worker_takes_the_sum_of_all_work_and_fetches_nothing():
    parts = run(1, matched=True, bandwidth=1.0).block(1)
    steps = PruneConfig().matching.of(1).steps(16)
    assert parts == {"windows": 48.0, "layers": 16 * 0.5 + 13.0, "matching": 4.0 * steps, "spreading": 0.0}


@pytest.mark.parametrize("matched", [False, True])
def test_more_workers_are_faster_and_matching_is_not(matched):
    one, many = run(1, matched).block(1), run(16, matched).block(1)
    assert many["windows"] == one["windows"] / 16 and many["layers"] == 16 * 0.5 + 10.0
    assert many["matching"] == one["matching"]
    assert run(16, matched).days() < run(1, matched).days()


def test_a_slower_line_takes_longer():
    assert run(8, True, 1e6).days() > run(8, True, 1e9).days() > run(8, True).days()


def test_costs_grow_with_operations():
    large = COSTS.enlarged(2.0)
    assert large.forward == COSTS.forward * SHRINK**2 / 2 and large.tuning == COSTS.tuning * SHRINK**2 / 2
    assert large.layers["q"] == LayerCost((64, 64), "q", 0.5 * SHRINK**2 / 2, 10.0 * SHRINK**3 / 2)


def test_costs_are_kept_in_a_file(tmp_path):
    COSTS.write(tmp_path / "costs.json")
    assert Costs.read(tmp_path / "costs.json") == COSTS
