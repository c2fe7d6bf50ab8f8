"""Of several blocks for each layer, those that cost the model least for so many entries of wrappers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

Shape = tuple[int, int]


@dataclass(frozen=True)
class Offer:
    """Blocks that a layer may have.

    Args:
        block: (block_out, block_in). entries: of its wrappers. price: what the layer then costs, in any unit that adds
            up over layers.
    """

    block: Shape
    entries: int
    price: float


def worthwhile(offers: Sequence[Offer]) -> list[Offer]:
    """The offers on the lower convex hull, by entries: each step to the next one gains less an entry than the last."""
    hull: list[Offer] = []
    for offer in sorted(offers, key=lambda offer: (offer.entries, offer.price)):
        if hull and offer.price >= hull[-1].price:
            continue
        while len(hull) > 1 and gain(hull[-1], offer) >= gain(hull[-2], hull[-1]):
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
        (gain(less, more), layer, step + 1, more.entries - less.entries)
        for layer, ladder in ladders.items()
        for step, (less, more) in enumerate(pairwise(ladder))
    ]
    for _, layer, step, more in sorted(steps, reverse=True):
        if step == taken[layer] + 1 and more <= left:  # a layer whose step did not fit stays where it is
            taken[layer], left = step, left - more
    return {layer: ladder[taken[layer]] for layer, ladder in ladders.items()}
