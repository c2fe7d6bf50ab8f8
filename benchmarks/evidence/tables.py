"""The tables of docs/evidence.md, from the figures that an `Experiment` keeps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from benchmarks.evidence.correlation import (
    Estimate,
    Groups,
    Indices,
    Vector,
    bootstrap,
    centered,
    geometric_mean,
    mean_within,
    pearson,
    spearman,
)
from benchmarks.evidence.methods import OURS
from benchmarks.evidence.proxies import PROXIES

Json = dict[str, Any]
DRAWS = 400  # of the bootstrap


@dataclass(frozen=True)
class Points:
    """Every (layer, method) pair that was measured.

    Args:
        figures: of an `Experiment`. methods: those to look at.
    """

    figures: Json
    methods: Sequence[str]

    @cached_property
    def keys(self) -> list[tuple[str, str]]:
        """Layer and method of each point."""
        points = self.figures["points"]
        return [(layer, method) for layer in points for method in self.methods if method in points[layer]]

    @cached_property
    def layers(self) -> list[str]:
        """The layer of each point."""
        return [layer for layer, _ in self.keys]

    @cached_property
    def kl(self) -> Vector:
        """The KL divergence of each point."""
        return np.array([np.mean(self.figures["points"][layer][method]["kl"]) for layer, method in self.keys])

    def relative(self, proxy: str) -> Vector:
        """The proxy of the error over that of the weight."""
        energies = np.array([self.figures["layers"][layer]["energies"][proxy] for layer in self.layers])
        return self._losses(proxy) / energies

    def predicted(self, proxy: str) -> Vector:
        """The KL divergence that the proxy foretells to second order, in nats.

        tr(G R H R') / 2; without G, the mean importance of an output stands in for it.
        """
        importance = np.array([self.figures["layers"][layer]["importance"] for layer in self.layers])
        return self._losses(proxy) / 2 * (1 if proxy.startswith("G") else importance)

    def _losses(self, proxy: str) -> Vector:
        return np.array([self.figures["points"][layer][method]["losses"][proxy] for layer, method in self.keys])


Correlation = Callable[[Vector, Vector, Indices, Groups], float]

# Each takes the logarithms of proxy and KL, the layers and the methods.
WITHIN: dict[str, Correlation] = {
    "Pearson": lambda x, y, layers, methods: pearson(centered(x, layers), centered(y, layers)),
    "Spearman": lambda x, y, layers, methods: mean_within(spearman, x, y, layers),
}
POOLED: dict[str, Correlation] = {
    "Pearson": lambda x, y, layers, methods: pearson(x, y),
    "Spearman": lambda x, y, layers, methods: spearman(x, y),
}
ACROSS: dict[str, Correlation] = {"Spearman": lambda x, y, layers, methods: mean_within(spearman, x, y, methods)}
COLUMNS: list[tuple[str, str, Correlation]] = [
    *((f"one layer, {name}", "relative", found) for name, found in WITHIN.items()),
    *((f"all, relative loss, {name}", "relative", found) for name, found in POOLED.items()),
    *((f"all, predicted KL, {name}", "predicted", found) for name, found in POOLED.items()),
    *((f"one method, predicted KL, {name}", "predicted", found) for name, found in ACROSS.items()),
]


def correlation(points: Points, proxy: str, scale: str, statistic: Correlation, less: str | None = None) -> Estimate:
    """A correlation of log proxy and log KL with its interval over layers; ``less`` a proxy, the difference to it."""
    y = np.log(points.kl)
    xs = [np.log(getattr(points, scale)(name)) for name in (proxy, less) if name is not None]
    methods = np.unique([method for _, method in points.keys], return_inverse=True)[1]

    def found(index: Indices, layers: Indices) -> float:
        values = [statistic(x[index], y[index], layers, methods[index]) for x in xs]
        return values[0] - sum(values[1:])

    return bootstrap(found, points.layers, draws=DRAWS)


def correlation_table(figures: Json, methods: Sequence[str], less: str | None = None) -> str:
    """A line a proxy, a column for each sense in which it may foretell the KL divergence."""
    points = Points(figures, methods)
    rows = [
        [name, *(_shown(correlation(points, name, scale, statistic, less)) for _, scale, statistic in COLUMNS)]
        for name in PROXIES
        if name != less
    ]
    return table(["proxy", *(title for title, _, _ in COLUMNS)], rows)


def error_table(figures: Json, methods: Sequence[str]) -> str:
    """How far off the predicted KL is: the geometric mean of the true one over it, and its geometric deviation."""
    points = Points(figures, methods)
    rows = []
    for name in PROXIES:
        if name != "paper":  # its scales make it no estimate of anything in nats
            logs = np.log(points.kl / points.predicted(name))
            rows.append([name, f"{np.exp(logs.mean()):.2f}", f"{np.exp(logs.std()):.2f}"])
    return table(["proxy", "KL over the predicted", "times or divided by"], rows)


def ratio_table(figures: Json, methods: Sequence[str], base: str = OURS, proxy: str = "H") -> str:
    """A line a method: its KL divergence over that of ``base``, the geometric mean over layers and by kind of layer."""
    points = Points(figures, [base])
    layers = [layer for layer, _ in points.keys if all(name in figures["points"][layer] for name in methods)]
    kinds = list(dict.fromkeys(kind(layer) for layer in layers))
    rows = []
    for method in methods:
        ratios = {layer: _kl(figures, layer, method) / _kl(figures, layer, base) for layer in layers}
        each = [np.exp(np.mean([np.log(ratio) for layer, ratio in ratios.items() if kind(layer) == k])) for k in kinds]
        points = Points(figures, [method])
        loss = points.relative(proxy)[np.isin(points.layers, layers)].mean()
        mean_kl = np.mean([_kl(figures, layer, method) for layer in layers])
        rows.append(
            [
                method,
                f"{loss:.4f}",
                f"{mean_kl:.5f}",
                _shown(geometric_mean(np.array(list(ratios.values()))), 3),
                *(f"{value:.3f}" for value in each),
            ]
        )
    return table(["", f"mean loss in {proxy}", "mean KL", f"KL over that of {base}", *kinds], rows)


def fact_table(figures: Json) -> str:
    """What the top 1% of the tokens hold of the Gram matrices, by layer."""
    names = ["top tokens of H", "top tokens of H~", "top tokens of H~, not clipped"]
    rows = [[layer, *(f"{facts[name]:.3f}" for name in names)] for layer, facts in figures["layers"].items()]
    return table(["layer", *names], rows)


def kind(layer: str) -> str:
    """The last part of a layer's name."""
    return layer.rpartition(".")[2]


def _kl(figures: Json, layer: str, method: str) -> float:
    return float(np.mean(figures["points"][layer][method]["kl"]))


def _shown(estimate: Estimate, digits: int = 2) -> str:
    value, low, high = (f"{x:.{digits}f}" for x in (estimate.value, estimate.low, estimate.high))
    return f"{value} ({low} to {high})"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
