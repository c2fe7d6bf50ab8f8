r"""The wrappers' entries of all layers shared out by what each layer costs the model.

The price of a layer, in nats a token (`armorfact_hf.pruning.prices`), falls with its wrappers' share s of its entries
about as :math:`p\,e^{-\rho s}`; one :math:`\rho` is taken for all layers (``python -m benchmarks.prices``). So many
entries in all cost the model least where one more would gain the same everywhere: a layer with a higher price for each
of its entries gets larger blocks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

from armorfact import Pattern
from armorfact.sizes import fitting
from armorfact_hf.model.structure import Layer
from armorfact_hf.pruning.config import PruneConfig

RATE = 3.3  # rho
ROUNDING = 1e-12  # of gains, relative
RANGE = 1 / 6, 4  # times the blocks of "auto": the sizes that a layer may get


@dataclass(frozen=True)
class Offer:
    """Blocks that a layer may have.

    Args:
        block: (block_out, block_in). entries: of its wrappers. price: what the layer then costs, in any unit that adds
            up over layers.
    """

    block: tuple[int, int]
    entries: int
    price: float


def shared_out(layers: Iterable[Layer], prices: Mapping[str, float], config: PruneConfig) -> list[Layer]:
    """The layers, those with a price with other blocks: no more entries in all, and the least sum of prices.

    Args:
        layers: with the blocks of "auto".
        prices: by layer, of any unit that adds up, for wrappers of no size.
    """
    layers = list(layers)
    priced = {layer.name: layer for layer in layers if layer.name in prices and layer.block is not None}
    offered = {name: offers(layer, prices[name], config) for name, layer in priced.items()}
    allowed = sum(_entries(layer.shape, layer.block) for layer in priced.values() if layer.block)
    found = chosen(offered, allowed)
    return [replace(layer, block=found[layer.name].block) if layer.name in found else layer for layer in layers]


def offers(layer: Layer, price: float, config: PruneConfig) -> list[Offer]:
    """Square blocks around those that a layer has, which fit what each rank holds of it, and the price with each."""
    (d_out, d_in), ranks = layer.shape, config.tensor_parallel
    block_out, block_in = layer.block or (1, 1)
    common, group = math.gcd(d_out // ranks, d_in // ranks), Pattern.parse(config.pattern).group
    least, most = (times * block_in for times in RANGE)
    sizes = [size for size in fitting(common, group) if least <= size <= most] if block_out == block_in else []
    blocks = [(size, size) for size in sizes] or [(block_out, block_in)]
    return [
        Offer(block, entries, price * math.exp(-RATE * entries / (d_out * d_in)))
        for block, entries in ((block, _entries(layer.shape, block)) for block in blocks)
    ]


def _entries(shape: tuple[int, int], block: tuple[int, int]) -> int:
    return sum(size * length for size, length in zip(block, shape, strict=True))


def worthwhile(offers: Sequence[Offer]) -> list[Offer]:
    """The offers on the lower convex hull, by entries: no step gains more an entry than the one before.

    Of steps that gain alike, up to rounding, each stands for itself: one may fit where two do not.
    """
    hull: list[Offer] = []
    for offer in sorted(offers, key=lambda offer: (offer.entries, offer.price)):
        if hull and offer.price >= hull[-1].price:
            continue
        while len(hull) > 1 and gain(hull[-1], offer) > gain(hull[-2], hull[-1]) * (1 + ROUNDING):
            hull.pop()
        hull.append(offer)
    return hull


def gain(less: Offer, more: Offer) -> float:
    """What an entry brings on the way from one offer to a larger one."""
    return (less.price - more.price) / (more.entries - less.entries)


def chosen(offers: Mapping[str, Sequence[Offer]], entries: int) -> dict[str, Offer]:
    """An offer for each layer, of at most so many entries in all, greedily: the step that gains most an entry is next.

    Without the last steps, which may not fit any more, this is the least sum of prices that there is.

    Raises:
        ValueError: the smallest offers have too many entries.
    """
    ladders = {layer: worthwhile(given) for layer, given in offers.items()}
    taken = dict.fromkeys(ladders, 0)
    left = entries - sum(ladder[0].entries for ladder in ladders.values())
    if left < 0:
        raise ValueError(f"the smallest blocks offered have {-left} entries more than the {entries} allowed")
    steps = [
        (-least, step + 1, layer, ladder[step + 1].entries - ladder[step].entries)
        for layer, ladder in ladders.items()
        for step, least in enumerate(accumulate((gain(*pair) for pair in pairwise(ladder)), min))  # rounding aside
    ]
    for _, step, layer, more in sorted(steps):  # of equal gains, the first step of a layer before its second
        if step == taken[layer] + 1 and more <= left:  # a layer whose step did not fit stays where it is
            taken[layer], left = step, left - more
    return {layer: ladder[taken[layer]] for layer, ladder in ladders.items()}
