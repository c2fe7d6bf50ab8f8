"""What the blocks of "priced" rest on: by which rate a layer's price falls with its wrappers, and what foretells it.

    python -m benchmarks.prices --model demo:smollm2

Every linear layer of every third decoder block is pruned alone by SparseGPT and, in three sweeps, with wrappers of the
blocks of "auto" and of about twice those. The price is what `armorfact_hf.pruning.prices` foretells of each
error, in nats a token. The first table has the rate ρ of a price that goes as exp(-ρ s), s the wrappers' share of the
layer's entries: the mean over layers, the least and the most. Below it stand the correlation of the logarithms of two
prices an entry, by SparseGPT and with the blocks of "auto", and how far the one times a constant is from the other. The
last table has the part that each kind of layer has in the sum of all prices.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import correlation, fmean, stdev
from typing import Any

from armorfact import factorize
from armorfact.sizes import fitting
from armorfact_hf.data.calibration import Calibration
from armorfact_hf.data.load_model import load_model
from armorfact_hf.observer import Observer
from armorfact_hf.pruning.config import PruneConfig
from armorfact_hf.pruning.job import Job, make_job
from armorfact_hf.pruning.prices import FisherSample, fisher_samples
from armorfact_hf.pruning.progress import Progress
from benchmarks.evidence.tables import kind, table
from benchmarks.kept import kept
from benchmarks.results import one_in

SWEEPS = 3
Json = dict[str, Any]


def job_of(model: str, every: int, calibration: Calibration) -> Job:
    """A model of which one decoder block in so many is priced."""
    loaded = load_model(model, "bfloat16", log=lambda _: None)
    config = PruneConfig(include=one_in(loaded.model, every), block="priced")
    return make_job(loaded.model.eval(), calibration.tokens(loaded, lambda _: None), config)


def measured(one: FisherSample) -> Json:
    """The prices of a layer by SparseGPT (a share of 0), with the blocks that it has and with larger ones."""
    d_out, d_in = one.layer.shape
    least = one.layer.block[0] if one.layer.block else 0
    sizes = [size for size in fitting(math.gcd(d_out, d_in), 4) if size >= least]
    blocks = [sizes[0], min(sizes, key=lambda size: abs(size - 2 * least))]
    points = [(0.0, one.divergence(one.by_sparsegpt("2:4")))]
    for size in dict.fromkeys(blocks):
        pruned = factorize(one.weight, one.gram, block=size, max_sweeps=SWEEPS).dense()
        points.append((size / d_out + size / d_in, one.divergence(pruned)))
    return {"name": one.layer.name, "entries": d_out * d_in, "points": points}


def rate(layer: Json) -> float:
    """ρ between the two sizes of blocks.

    >>> round(rate({"points": [(0, 9), (0.1, 2.0), (0.2, 2.0 * math.exp(-0.33))]}), 6)
    3.3
    """
    (less, dear), (more, cheap) = layer["points"][1], layer["points"][-1]
    return math.log(dear / cheap) / (more - less)


def rate_table(layers: Sequence[Json]) -> str:
    """A column a kind of layer."""
    rates: dict[str, list[float]] = {}
    for layer in layers:
        if len(layer["points"]) > 2:
            rates.setdefault(kind(layer["name"]), []).append(rate(layer))
    row = [f"{fmean(x):.1f} ({min(x):.1f} to {max(x):.1f})" for x in rates.values()]
    return table(["", *rates], [["ρ", *row]])


def share_table(layers: Sequence[Json]) -> str:
    """A column a kind of layer: its part of what all cost, by SparseGPT."""
    costs: dict[str, float] = {}
    for layer in layers:
        costs[kind(layer["name"])] = costs.get(kind(layer["name"]), 0.0) + layer["points"][0][1]
    return table(["", *costs], [["of the price", *(f"{cost / sum(costs.values()):.3f}" for cost in costs.values())]])


def foretold(layers: Sequence[Json]) -> str:
    """How well the price by SparseGPT stands for that with wrappers."""
    both = [[math.log(layer["points"][k][1] / layer["entries"]) for layer in layers] for k in (0, 1)]
    apart = stdev(x - y for x, y in zip(*both, strict=True))
    return f"correlation {correlation(*both):.3f}; apart by a factor of {math.exp(apart):.2f} (one standard deviation)"


def main(given: Sequence[str] | None = None) -> None:
    """Measure, unless that was done, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo:smollm2")
    parser.add_argument("--every", type=int, default=3, help="one decoder block in so many is looked at")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--calibration", default=Calibration().text)
    parser.add_argument("--out", type=Path, default=Path("pruned-results"))
    arguments = parser.parse_args(given)
    calibration = Calibration(arguments.calibration, arguments.windows, arguments.length)

    def found() -> list[Json]:
        job = job_of(arguments.model, arguments.every, calibration)
        return [measured(one) for one in fisher_samples(job, Progress(Observer(), 0), None)]

    layers = kept(arguments.out, "prices", [arguments.model, arguments.every, asdict(calibration)], found)
    print(rate_table(layers), foretold(layers), share_table(layers), sep="\n\n")


if __name__ == "__main__":
    main()
