"""The ablation of the solver over whole models: what one pass, and 1 to 100 sweeps, leave of perplexity.

Layers alone: matching their blocks would make good for some of what fewer sweeps leave.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from armorfact import factorize
from armorfact_hf.pruning import layer as pruning
from benchmarks.evidence.one_pass import OnePass
from benchmarks.evidence.tables import table
from benchmarks.results import EVERY_THIRD, Run, dense_figures, measure

SWEEPS = (1, 5, 20, 100)


def whole_table(model: str, out: Path, third: bool = False, measure: Callable = measure) -> str:
    """Perplexity on two texts and mean layer loss; figures are kept in ``out``.

    Args:
        third: prune every third decoder block only.
    """
    common = {"baselines": (), "refine": None} | ({"include": EVERY_THIRD} if third else {})
    runs = [Run("sparsegpt", {**common, "method": "sparsegpt"})]
    runs += [Run(f"{count} sweeps", {**common, "sweeps": count, "rtol": 0.0}) for count in SWEEPS]
    (out / "one-pass").mkdir(parents=True, exist_ok=True)
    with factorizing(solver=OnePass()):
        once = measure(Run("one pass", {**common, "sweeps": 1, "rtol": 0.0}), model, out / "one-pass")
    found = [once, *(measure(run, model, out) for run in runs)]
    first, second = dense_figures(model, out)
    rows = [["dense", f"{first:.2f}", f"{second:.2f}", "", ""]]
    for line in found:
        first, second = line["perplexity"]
        rows.append([line["label"], f"{first:.2f}", f"{second:.2f}", f"{line['loss']:.4f}", f"{line['seconds']:.0f}"])
    return table(["run", "gensim-enwiki", "qasper", "mean layer loss", "seconds"], rows)


@contextmanager
def factorizing(**changes: Any) -> Iterator[None]:
    """Inside, layers are factorized with these arguments as well; no setting of the adapters names them."""
    kept = pruning.factorize
    pruning.factorize = partial(factorize, **changes)
    try:
        yield
    finally:
        pruning.factorize = kept
