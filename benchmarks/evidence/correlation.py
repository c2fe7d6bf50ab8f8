"""How well one figure predicts another: correlations with intervals that know which points belong together.

The points are (layer, method) pairs. Six methods on one layer share its weight and its inputs, so they are not six
independent observations: the bootstrap draws whole layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]
Indices = NDArray[np.int64]
Groups = Sequence[str] | Indices
Statistic = Callable[[Vector, Vector], float]


@dataclass(frozen=True)
class Estimate:
    """A statistic and the interval that holds 95% of its bootstrap draws."""

    value: float
    low: float
    high: float


def pearson(x: Vector, y: Vector) -> float:
    """The linear correlation of two vectors; NaN where one of them is constant."""
    x, y = x - x.mean(), y - y.mean()
    norms = float(np.sqrt((x @ x) * (y @ y)))
    return float(x @ y) / norms if norms > 0 else float("nan")


def ranks(values: Vector) -> Vector:
    """The ranks 1, 2, … of the values; equal values share the mean of theirs."""
    _, group, count = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(count)
    return (last - (count - 1) / 2)[group]


def spearman(x: Vector, y: Vector) -> float:
    """The correlation of the ranks."""
    return pearson(ranks(x), ranks(y))


def centered(values: Vector, groups: Groups) -> Vector:
    """The values less the mean of their group: what is left when every group has its own level."""
    _, group = np.unique(np.asarray(groups), return_inverse=True)
    means = np.bincount(group, values) / np.bincount(group)
    return values - means[group]


def mean_within(statistic: Statistic, x: Vector, y: Vector, groups: Groups) -> float:
    """The mean over the groups of a statistic of their own points; groups where it is NaN are left out."""
    names = np.asarray(groups)
    found = [statistic(x[names == name], y[names == name]) for name in np.unique(names)]
    return float(np.nanmean(found)) if np.isfinite(found).any() else float("nan")


def bootstrap(
    statistic: Callable[[Indices, Indices], float], groups: Sequence[str], draws: int = 1000, seed: int = 0
) -> Estimate:
    """A statistic of all points, and its interval when whole groups are drawn with replacement.

    Args:
        statistic: of the points with the given indices, and the numbers of their groups; a group drawn twice comes
            under two numbers.
        groups: the group of each point.
    """
    names = np.asarray(groups)
    members = [np.flatnonzero(names == name) for name in np.unique(names)]

    def drawn(chosen: Sequence[int] | Indices) -> float:
        sizes = [len(members[k]) for k in chosen]
        return statistic(np.concatenate([members[k] for k in chosen]), np.repeat(np.arange(len(sizes)), sizes))

    generator = np.random.default_rng(seed)
    found = [drawn(generator.integers(len(members), size=len(members))) for _ in range(draws)]
    low, high = np.nanquantile(found, [0.025, 0.975])
    return Estimate(drawn(range(len(members))), float(low), float(high))


def geometric_mean(ratios: Vector) -> Estimate:
    """exp of the mean logarithm, with its bootstrap interval."""
    logs = np.log(ratios)
    found = bootstrap(lambda index, _: float(logs[index].mean()), [str(k) for k in range(len(logs))])
    return Estimate(*(float(np.exp(value)) for value in (found.value, found.low, found.high)))
