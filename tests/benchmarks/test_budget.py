"""Blocks by budget: the choice against every choice there is, prices between two solves, and a whole tiny run."""

from __future__ import annotations

import math
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from armorfact_hf.evaluation.measure import Evaluation
from armorfact_hf.pruning.config import PruneConfig
from armorfact_hf.pruning.prune import prune_
from armorfact_hf.pruning.workers import in_process
from armorfact_hf.runs.prune_to_folder import Calibration
from benchmarks.budget import __main__ as command
from benchmarks.budget import prices
from benchmarks.budget.choice import Offer, chosen, worthwhile
from benchmarks.budget.forms import DEFAULT, blocks_of, entries, falling, given_blocks
from benchmarks.budget.prices import PRICES, offers, solved_sizes
from benchmarks.shared import quality
from tests.hf.models import random_tokens, tiny_model

LOSSES = st.lists(st.floats(0.01, 10), min_size=1, max_size=4)


def ladder(gains):
    """Offers of 1, 2, … entries, each cheaper than the last by a gain, the largest first."""
    gains = sorted(gains, reverse=True)
    total = sum(gains)
    return [Offer((k, k), k + 1, total - sum(gains[:k])) for k in range(len(gains) + 1)]


@given(LOSSES, LOSSES, LOSSES, st.integers(3, 15))
def test_no_choice_of_as_many_entries_is_cheaper(first, second, third, allowed):
    offered = {name: ladder(gains) for name, gains in zip("abc", (first, second, third), strict=True)}
    found = chosen(offered, allowed)
    used = sum(offer.entries for offer in found.values())
    assert used <= allowed
    every = product(*offered.values())
    best = min(sum(x.price for x in each) for each in every if sum(x.entries for x in each) <= used)
    assert sum(offer.price for offer in found.values()) <= best * (1 + 1e-12) + 1e-12


def test_what_is_larger_and_dearer_or_above_the_hull_is_no_offer():
    kept = [Offer((1, 1), 1, 10.0), Offer((3, 3), 3, 2.0), Offer((5, 5), 5, 1.0)]
    assert worthwhile([*kept, Offer((2, 2), 2, 9.0), Offer((4, 4), 4, 3.0)]) == kept


def test_too_few_entries_are_refused():
    with pytest.raises(ValueError, match="2 entries more than the 1 allowed"):
        chosen({name: [Offer((4, 4), 1, 1.0)] for name in "abc"}, 1)


def layer(shape=(576, 1536), size=48, level=1.0):
    losses = {s: level / s for s in solved_sizes(shape, size)}
    points = [{"size": s, "losses": {"H": loss, "H~": loss}} for s, loss in losses.items()]
    return {"shape": shape, "default": (size, size), "importance": 2.0, "energies": {"H": 1.0}, "points": points}


def test_solved_sizes_are_near_multiples_of_the_default_and_fit():
    assert solved_sizes((576, 1536), 48) == [48, 96]
    assert solved_sizes((192, 576), 16) == [16, 32]


def test_prices_are_those_solved_for_and_on_their_line_elsewhere():
    found = {offer.block[0]: offer for offer in offers(layer(), PRICES["budget by KL"])}
    assert list(found) == [8, 12, 16, 24, 32, 48, 64, 96]
    assert found[48].price == pytest.approx(1 / 48) and found[96].price == pytest.approx(1 / 96)
    assert found[64].price == pytest.approx((1 / 48) ** (2 / 3) * (1 / 96) ** (1 / 3))
    assert found[24].price == pytest.approx(2**0.5 / 48)
    assert found[64].entries == entries((576, 1536), (64, 64))


def test_the_rate_is_that_by_which_prices_fall_with_the_share_of_wrappers():
    one = layer()
    for point in one["points"]:
        point["losses"]["H~"] = math.exp(-3.5 * point["size"] * (1 / 576 + 1 / 1536))
    assert falling(one, PRICES["budget by KL"]) == pytest.approx(3.5)


def test_dear_layers_get_larger_blocks_at_the_entries_of_the_default():
    solved = {"x.up": layer(level=1.0), "x.down": layer(level=9.0)}
    found = blocks_of("budget by KL", solved)
    assert found["x.up"][0] < 48 < found["x.down"][0]
    total = sum(entries((576, 1536), block) for block in found.values())
    assert total <= sum(entries((576, 1536), block) for block in blocks_of(DEFAULT, solved).values())


def test_a_model_is_pruned_with_the_blocks_given():
    model, before = tiny_model("llama"), in_process.prune_layers
    config = PruneConfig(sweeps=1, refine=None, baselines=(), include=("q_proj", "up_proj"))
    names = [f"model.layers.{k}.{name}" for k in range(3) for name in ("self_attn.q_proj", "mlp.up_proj")]
    sizes = [(8, 8), (16, 16), (4, 4), (32, 32), (16, 16), (8, 8)]
    with given_blocks(dict(zip(names, sizes, strict=True))):
        report = prune_(model, random_tokens(), config)
    assert in_process.prune_layers is before
    assert [x.block for x in report.layers] == sizes
    assert quality.figures(report)["blocks"] == {}


def test_the_command_prints_its_tables_and_measures_once(model_folder, text_file, tmp_path, monkeypatch, capsys):
    calibration = Calibration(str(text_file), windows=2, length=16)
    monkeypatch.setattr(quality, "TEXTS", [Evaluation(str(text_file), windows=1, length=16)] * 2)
    monkeypatch.setattr(command, "dense_figures", lambda *_: [50.0, 60.0])
    monkeypatch.setattr(command, "Calibration", lambda: calibration)
    monkeypatch.setattr(quality, "Calibration", lambda: calibration)
    monkeypatch.setattr(command, "solved_layers", lambda *given: prices.solved_layers(*given, calibration))
    given = ["--model", str(model_folder), "--out", str(tmp_path)]
    command.main(given)
    printed = capsys.readouterr().out
    assert all(f"| {form} |" in printed for form in (DEFAULT, *PRICES)) and "q_proj" in printed
    matched = [*given, "--refine", "block"]
    command.main(matched)
    after = capsys.readouterr().out
    assert after not in printed
    for module in (command, quality):
        monkeypatch.setattr(module, "measure", None)
    command.main(matched)
    assert capsys.readouterr().out in after
    command.main(given)
    assert capsys.readouterr().out in printed
