"""Perplexity, layer losses and bytes of a model whose projections share their right wrapper, or do not."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from armorfact_hf.data.calibration import Calibration
from armorfact_hf.data.load_model import load_model
from armorfact_hf.layers.format import LayerFormat
from armorfact_hf.layers.strategies.strategy import PAIR
from armorfact_hf.pruning.config import PruneConfig
from armorfact_hf.pruning.layer import LayerReport
from armorfact_hf.pruning.prune import PruneReport, prune_
from benchmarks.evidence.tables import table
from benchmarks.kept import kept
from benchmarks.results import one_in, perplexities
from benchmarks.shared.sharing import Sharing, shared_right

FORMS = {
    "one each": None,
    "one each even": Sharing(apart=True),
    "shared square": Sharing(square=True),
    "shared wide": Sharing(),
    "shared square relative": Sharing(square=True, relative=True),
    "shared wide relative": Sharing(relative=True),
}


def measured(
    model: str, form: str, every: int, out: Path, calibration: Calibration | None = None, refine: str | None = None
) -> dict[str, Any]:
    """The figures of a form, measured unless they are kept in ``out``.

    Args:
        every: one decoder block in so many is pruned. refine: as in `PruneConfig`.
    """
    calibration = Calibration() if calibration is None else calibration
    key = [model, form, every, asdict(calibration), refine]
    return kept(out, "shared", key, lambda: measure(model, every, calibration, shared_right(FORMS[form]), refine))


def measure(
    model: str, every: int, calibration: Calibration, inside: AbstractContextManager, refine: str | None = None
) -> dict[str, Any]:
    """The figures of a model of which one decoder block in so many was pruned, inside a context that changes how."""
    loaded = load_model(model, "bfloat16")
    config = PruneConfig(include=one_in(loaded.model, every), sweeps=10, refine=refine, baselines=())
    with inside:
        report = prune_(loaded.model, calibration.tokens(loaded, print), config)
    return figures(report) | {"perplexity": perplexities(loaded)}


def figures(report: PruneReport) -> dict[str, Any]:
    """Losses by projection and in the mean, the bytes of the wrappers, seconds, and blocks where they are all alike."""
    found: dict[str, list[LayerReport]] = {}
    for layer in report.layers:
        found.setdefault(layer.name.rpartition(".")[2], []).append(layer)
    return {
        "loss": report.mean_loss(),
        "losses": {name: fmean(x.losses["armorfact"] for x in layers) for name, layers in found.items()},
        "wrapper bytes": sum(map(wrapper_bytes, report.layers)),
        "dense bytes": sum(layer.dense_bytes for layer in report.layers),
        "seconds": report.seconds,
        "blocks": {name: layers[0].block for name, layers in found.items() if len({x.block for x in layers}) == 1},
    }


def wrapper_bytes(report: LayerReport) -> int:
    """The bytes of a bfloat16 layer that are not its core's."""
    return report.bytes - LayerFormat(report.name, report.shape, PAIR, None).nbytes(torch.bfloat16)


def quality_table(found: dict[str, dict[str, Any]], dense: list[float]) -> str:
    """A line a form; a gap is the share of what the first form loses that another wins back."""
    header = ["run", "gensim-enwiki", "qasper", "gap closed", "mean layer loss", "wrappers", "seconds"]
    rows = [["dense", *(f"{value:.2f}" for value in dense), "", "", "", ""]]
    base = next(iter(found.values()))["perplexity"]
    for form, line in found.items():
        gaps = [(old - new) / (old - best) for old, new, best in zip(base, line["perplexity"], dense, strict=True)]
        share = line["wrapper bytes"] / line["dense bytes"]
        first, second = (f"{value:.2f}" for value in line["perplexity"])
        closed = ", ".join(f"{gap:+.1%}" for gap in gaps)
        rows.append([form, first, second, closed, f"{line['loss']:.4f}", f"{share:.4f}", f"{line['seconds']:.0f}"])
    return table(header, rows)


def loss_table(found: dict[str, dict[str, Any]]) -> str:
    """A line a form, a column a projection: its mean loss over the decoder blocks, and its blocks if they are alike."""
    names = list(next(iter(found.values()))["losses"])
    rows = []
    for form, line in found.items():
        blocks = {name: f" ({'x'.join(map(str, block))})" for name, block in line["blocks"].items()}
        rows.append([form, *(f"{line['losses'][name]:.4f}{blocks.get(name, '')}" for name in names)])
    return table(["run", *names], rows)
