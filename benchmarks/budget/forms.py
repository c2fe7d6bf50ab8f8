"""Blocks by budget: chosen from prices, pruned with, and told in a table."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from statistics import fmean

from armorfact_hf.pruning.config import PruneConfig
from armorfact_hf.pruning.side_by_side import Keep, forget, prune_layers
from benchmarks.budget.choice import Shape, chosen
from benchmarks.budget.prices import PRICES, Json, Price, offers
from benchmarks.evidence.tables import kind, table
from benchmarks.shared.sharing import Pruned, Work, pruned_by

DEFAULT = "default"
Blocks = dict[str, Shape]


def blocks_of(form: str, solved: Mapping[str, Json]) -> Blocks:
    """The blocks of each layer, of at most the entries that the default's have in all.

    Args:
        form: `DEFAULT`, or how layers are priced. solved: see `solved_layers`.
    """
    default = {name: tuple(layer["default"]) for name, layer in solved.items()}
    if form == DEFAULT:
        return default
    offered = {name: offers(layer, PRICES[form]) for name, layer in solved.items()}
    allowed = sum(entries(solved[name]["shape"], block) for name, block in default.items())
    return {name: offer.block for name, offer in chosen(offered, allowed).items()}


def entries(shape: Shape, block: Shape) -> int:
    """Of the wrappers of a layer."""
    return sum(size * length for size, length in zip(block, shape, strict=True))


def given_blocks(blocks: Blocks) -> AbstractContextManager:
    """Inside, `prune_` gives the layers these blocks; its settings know one size for all, and "auto"."""
    return pruned_by(partial(_prune_in, blocks=blocks))


def _prune_in(
    work: Work, config: PruneConfig, keep: Keep = forget, each: int | None = None, *, blocks: Blocks
) -> list[Pruned]:
    resized = [(replace(layer, block=tuple(blocks[layer.name])), moments) for layer, moments in work]
    return prune_layers(resized, config, keep, each)


def foretold_table(found: Mapping[str, Blocks], solved: Mapping[str, Json]) -> str:
    """A line a form: entries of all wrappers over those of the layers, and the sum of each price."""
    weights = sum(layer["shape"][0] * layer["shape"][1] for layer in solved.values())
    rows = []
    for form, blocks in found.items():
        total = sum(entries(solved[name]["shape"], block) for name, block in blocks.items())
        sums = [sum(_price(solved[name], block, price) for name, block in blocks.items()) for price in PRICES.values()]
        rows.append([form, f"{total / weights:.4f}", *(f"{value:.4f}" for value in sums)])
    return table(["run", "wrappers", *(f"sum: {name}" for name in PRICES)], rows)


def _price(layer: Json, block: Shape, price: Price) -> float:
    return next(offer.price for offer in offers(layer, price) if offer.block == tuple(block))


def rate_table(solved: Mapping[str, Json]) -> str:
    """A line a price, a column a kind of layer: by what power of e it falls with the wrappers' share of the layer.

    From the default blocks to the larger ones that were solved with; the mean, the least and the most over layers.
    """
    kinds = list(dict.fromkeys(map(kind, solved)))
    rows = []
    for name, price in PRICES.items():
        each = {k: [falling(layer, price) for key, layer in solved.items() if kind(key) == k] for k in kinds}
        rows.append([name, *(f"{fmean(x):.1f} ({min(x):.1f} to {max(x):.1f})" for x in each.values())])
    return table(["", *kinds], rows)


def falling(layer: Json, price: Price) -> float:
    """The rate rho in a price that goes as exp(-rho s), s the wrappers' share of the layer's entries."""
    logs = [math.log(price(layer, point["losses"])) for point in layer["points"]]
    shares = [sum(point["size"] / length for length in layer["shape"]) for point in layer["points"]]
    return (logs[0] - logs[-1]) / (shares[-1] - shares[0])


def blocks_table(found: Mapping[str, Blocks]) -> str:
    """A line a form, a column a kind of layer: the mean size of its blocks, the smallest and the largest."""
    kinds = list(dict.fromkeys(kind(name) for name in next(iter(found.values()))))
    rows = []
    for form, blocks in found.items():
        sizes = {k: [block[0] for name, block in blocks.items() if kind(name) == k] for k in kinds}
        rows.append([form, *(f"{fmean(each):.0f} ({min(each)} to {max(each)})" for each in sizes.values())])
    return table(["run", *kinds], rows)
