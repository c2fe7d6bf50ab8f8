"""What blocks by prices rest on: the rate is that of the prices given, and a whole tiny run."""

from __future__ import annotations

import math

import pytest

from benchmarks import prices


def layer(name, level, rate, shares=(0.0, 0.1, 0.2)):
    return {"name": name, "entries": 100, "points": [(s, level * math.exp(-rate * s)) for s in shares]}


def test_the_rate_is_that_by_which_prices_fall():
    assert prices.rate(layer("a.q_proj", 2.0, 3.5)) == pytest.approx(3.5)
    table = prices.rate_table([layer("a.q_proj", 2.0, 3.0), layer("b.q_proj", 9.0, 4.0)])
    assert "3.5 (3.0 to 4.0)" in table and "q_proj" in table


def test_shares_of_the_price_are_by_sparsegpt():
    table = prices.share_table([layer("a.q_proj", 2.0, 3.0), layer("b.q_proj", 1.0, 4.0), layer("a.up_proj", 1.0, 9.0)])
    assert "q_proj" in table and "0.750" in table and "0.250" in table


def test_prices_in_proportion_are_foretold():
    found = prices.foretold([layer("a.q_proj", 2.0, 3.0), layer("b.q_proj", 9.0, 3.0), layer("c.q_proj", 1.0, 3.0)])
    assert found.startswith("correlation 1.000; apart by a factor of 1.00")


def test_the_command_measures_once(model_folder, text_file, tmp_path, monkeypatch, capsys):
    given = ["--model", str(model_folder), "--every", "2", "--windows", "2", "--length", "16"]
    given += ["--calibration", str(text_file), "--out", str(tmp_path)]
    prices.main(given)
    printed = capsys.readouterr().out
    assert "down_proj" in printed and "correlation" in printed
    monkeypatch.setattr(prices, "measured", None)
    prices.main(given)
    assert capsys.readouterr().out == printed
    with pytest.raises(TypeError):  # of other windows nothing is kept
        prices.main([*given, "--windows", "3"])
