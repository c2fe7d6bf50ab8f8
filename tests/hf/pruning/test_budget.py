"""Blocks by prices: the choice against every choice there is, and what it makes of layers."""

from __future__ import annotations

import math
from itertools import product

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn

from armorfact_hf.model.structure import Layer
from armorfact_hf.pruning.budget import RATE, Offer, chosen, offers, shared_out, worthwhile
from armorfact_hf.pruning.config import PruneConfig

GAINS = st.lists(st.floats(0.01, 10), min_size=1, max_size=4)
CONFIG = PruneConfig()


def ladder(gains):
    """Offers of 1, 2, … entries, each cheaper than the last by a gain, the largest first."""
    gains = sorted(gains, reverse=True)
    total = sum(gains)
    return [Offer((k, k), k + 1, total - sum(gains[:k])) for k in range(len(gains) + 1)]


@example([2.0], [1.0, 1.0], [1.0, 1.0, 0.5], 7)  # of equal gains one fits, two do not
@example([0.1, 0.1], [0.1, 0.1, 0.1], [0.3, 0.1, 0.1], 8)  # alike up to rounding
@given(GAINS, GAINS, GAINS, st.integers(3, 15))
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


def layer(name, d_out, d_in, size, block_in=None):
    return Layer(name, nn.Linear(d_in, d_out, bias=False), 0, (size, size if block_in is None else block_in))


def entries(layers):
    return sum(b * d for x in layers for b, d in zip(x.block, x.shape, strict=True))


def test_square_blocks_around_those_of_a_layer_are_offered_at_the_price_with_them():
    found = {offer.block: offer for offer in offers(layer("up", 1536, 576, 48), 2.0, CONFIG)}
    assert list(found) == [(size, size) for size in (8, 12, 16, 24, 32, 48, 64, 96)]
    assert found[64, 64].entries == 64 * (1536 + 576)
    assert found[64, 64].price == pytest.approx(2 * math.exp(-RATE * (64 / 1536 + 64 / 576)))


def test_blocks_fit_what_a_rank_holds():
    found = offers(layer("up", 1536, 576, 16), 2.0, PruneConfig(tensor_parallel=4))
    assert {144 % offer.block[0] for offer in found} == {384 % offer.block[0] for offer in found} == {0}
    assert max(offer.block[0] for offer in found) == 48


def test_blocks_that_are_not_square_stay():
    assert [offer.block for offer in offers(layer("up", 36, 64, 12, 16), 2.0, CONFIG)] == [(12, 16)]


@given(st.lists(st.floats(1e-6, 1e6), min_size=2, max_size=6))
def test_no_more_entries_in_all_and_dearer_layers_get_no_smaller_blocks(prices):
    layers = [layer(f"layer.{k}", 96, 96, 8) for k in range(len(prices))]
    found = shared_out(layers, {x.name: price for x, price in zip(layers, prices, strict=True)}, CONFIG)
    assert entries(found) <= entries(layers)
    sizes = [x.block[0] for x in found]
    for one, (price, size) in enumerate(zip(prices, sizes, strict=True)):
        assert all(size <= sizes[k] for k in range(len(prices)) if prices[k] > price), one


def test_layers_without_a_price_keep_their_blocks_and_their_entries():
    layers = [layer("dear", 96, 96, 8), layer("cheap", 96, 96, 8), layer("unknown", 96, 96, 8)]
    found = shared_out(layers, {"dear": 1.0, "cheap": 0.01}, CONFIG)
    assert [x.name for x in found] == ["dear", "cheap", "unknown"]
    assert found[0].block > (8, 8) > found[1].block
    assert found[2].block == (8, 8)
    assert entries(found[:2]) <= entries(layers[:2])
