"""What a layer costs the model by the size of its blocks, foretold from a cheap solve of each layer alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from armorfact import factorize
from armorfact.sizes import fitting
from armorfact_hf.data.load_model import load_model
from armorfact_hf.model.structure import Layer
from armorfact_hf.pruning.config import PruneConfig
from armorfact_hf.pruning.fitting import fitting_layers
from armorfact_hf.pruning.layer import shrunk
from armorfact_hf.runs.prune_to_folder import Calibration
from benchmarks.budget.choice import Offer, Shape
from benchmarks.evidence.proxies import Grams
from benchmarks.evidence.traces import read_trace, write_traces
from benchmarks.shared.quality import kept, one_in

Json = dict[str, Any]
Price = Callable[[Json, Json], float]

CALIBRATION = Calibration(windows=4, length=1024)
SWEEPS = 3
TIMES = (1, 2)  # the default blocks: those solved with; a line through log prices gives those of other sizes
RANGE = (1 / 6, 4)  # times the default: the sizes offered

# Both add up over layers: nats a token, as docs/evidence.md foretells them, and relative losses.
PRICES: dict[str, Price] = {
    "budget by KL": lambda layer, losses: layer["importance"] / 2 * losses["H~"],
    "budget by loss": lambda layer, losses: losses["H"] / layer["energies"]["H"],
}


def solved_layers(model: str, every: int, out: Path, calibration: Calibration = CALIBRATION) -> dict[str, Json]:
    """By layer of one decoder block in so many: its shape, default block, importance, energies, and losses by block.

    Each layer is kept in ``out`` as it is found.
    """
    loaded = load_model(model, "bfloat16", log=lambda _: None)
    layers = fitting_layers(loaded.model, PruneConfig(include=one_in(loaded.model, every)))[0]
    folder = out / f"traces-{model.replace(':', '-').replace('/', '-')}-{every}"
    tokens = calibration.tokens(loaded, lambda _: None)
    write_traces(folder, loaded.model, layers, tokens, {x.name: x.block[0] for x in layers}, lambda: None)
    key = [model, calibration.windows, calibration.length, SWEEPS, TIMES]

    def found(layer: Layer) -> Json:
        return kept(out, "solved", [*key, layer.name], lambda: _solved(layer, Grams(read_trace(folder, layers, layer))))

    return {layer.name: found(layer) for layer in layers}


def _solved(layer: Layer, grams: Grams) -> Json:
    weight = layer.weight.float()
    points = []
    for size in solved_sizes(layer.shape, layer.block[0]):
        points.append({"size": size, "losses": grams.energies(weight - _cheaply(weight, grams.plain, size), weight)})
    facts = {"importance": grams.facts()["importance"], "energies": grams.energies(weight, weight)}
    return {"shape": layer.shape, "default": layer.block, **facts, "points": points}


def _cheaply(weight: Tensor, gram: Tensor, size: int) -> Tensor:
    given = shrunk(gram, PruneConfig().diagonal_weight).float()
    return factorize(weight, given, block=size, max_sweeps=SWEEPS).dense()


def square_sizes(shape: Shape) -> list[int]:
    """Of blocks that fit rows and columns, up to 128 as in "auto"."""
    d_out, d_in = shape
    return [size for size in fitting(d_in, 4) if d_out % size == 0]


def solved_sizes(shape: Shape, default: int) -> list[int]:
    """The sizes that fit nearest to some multiples of the default."""
    sizes = square_sizes(shape)
    return sorted({min(sizes, key=lambda size: abs(np.log(size / (times * default)))) for times in TIMES})


def offers(layer: Json, price: Price) -> list[Offer]:
    """Square sizes around the default, priced as if log prices were linear in the size."""
    d_out, d_in = layer["shape"]
    solved = [point["size"] for point in layer["points"]]
    line = np.polyfit(solved, np.log([price(layer, point["losses"]) for point in layer["points"]]), len(solved) - 1)
    least, most = (times * layer["default"][0] for times in RANGE)
    sizes = [size for size in square_sizes((d_out, d_in)) if least <= size <= most]
    return [Offer((s, s), s * (d_out + d_in), float(np.exp(np.polyval(line, s)))) for s in sizes]
