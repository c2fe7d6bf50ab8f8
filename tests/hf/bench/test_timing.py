"""What bench prints is what was timed: medians of one layer, ratios the right way round."""

from __future__ import annotations

from itertools import cycle

import pytest
import torch
from rich.console import Console
from torch import nn

from armorfact_hf.bench import layers as bench
from armorfact_hf.bench import models, timing
from armorfact_hf.bench.timing import Timing, time_side_by_side
from armorfact_hf.cli.tables import timings
from armorfact_hf.pruning.config import PruneConfig
from armorfact_hf.pruning.prune import prune_
from tests.hf.models import random_tokens, tiny_model


class Ticking:
    """A clock that each layer moves on by its own time."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def layer(self, *seconds: float) -> nn.Module:
        takes = cycle(seconds)

        class Layer(nn.Module):
            def forward(_, x):
                self.now += next(takes)
                return x

        return Layer()


def test_the_median_of_one_layer(monkeypatch):
    monkeypatch.setattr(timing, "SECONDS", 0.0)  # three rounds
    clock = Ticking()
    forms = {"one": [clock.layer(9.0, 1.0, 5.0, 2.0)], "two": [clock.layer(4.0), clock.layer(2.0)]}
    assert time_side_by_side(forms, torch.ones(1, 1), clock) == {"one": 2.0, "two": 3.0}  # the first round warms up


def test_the_part_of_the_wrappers_is_what_the_core_alone_saves(monkeypatch):
    times = {"dense": 4.0, "packed": 2.0, "whole": 2.0, "bare": 1.5}
    monkeypatch.setattr(bench, "time_side_by_side", lambda forms, x: {name: times.get(name, 9.0) for name in forms})
    model = tiny_model("llama")
    prune_(model, random_tokens(), PruneConfig(sweeps=0, refine=None, block=8, baselines=()))
    found = bench.time_layers(model, [1])
    assert {one.wrappers for one in found} == {0.25} and {one.dense for one in found} == {4.0}
    assert {one.fastest() for one in found} == {"packed"}


def test_a_row_of_the_table():
    console = Console(width=200)
    one = Timing("16x32 in 8x8", 4, 2, 8e-6, {"dense": 8e-6, "packed": 2e-6, "unpacked": 16e-6}, 0.375)
    with console.capture() as captured:
        console.print(timings([one]))
    assert captured.get().splitlines()[-1].split() == [
        *("16x32", "in", "8x8", "4", "8", "2", "16", "packed", "4.00", "38%")
    ]


def test_tokens_a_second(model_folder, monkeypatch):
    monkeypatch.setattr(models, "_run", lambda model, tokens, new: (0.5, 0.25))
    found = models.throughput(str(model_folder), 20, 4, device="cpu")
    assert (found.prompt, found.decode) == (20 / 0.5, 4.0)


@pytest.mark.parametrize("allowed", [True, False])
def test_dense_is_the_fastest_only_where_it_may_be(allowed):
    one = Timing("16x32", 4, 1, 1.0, {"dense": 1.0, "packed": 3.0, "unpacked": 2.0}, 0.0)
    assert one.fastest(allowed) == ("dense" if allowed else "unpacked")
