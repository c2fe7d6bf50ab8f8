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
from benchmarks.results import Run, dense_figures, measure

SWEEPS = (1, 5, 20, 100)


def whole_table(model: str, out: Path, third: bool = False, measure: Callable = measure) -> str:
    """Perplexity on two texts and mean layer loss; figures are kept in ``out``.

    Args:
        third: prune every third decoder block only.
    """
    every = 3 if third else 1

    def swept(label: str, sweeps: int) -> Run:
        return Run(label, {"refine": None, "sweeps": sweeps, "rtol": 0.0}, every=every)

    runs = [Run("sparsegpt", {"method": "sparsegpt"}, every=every)]
    runs += [swept(f"{count} sweeps", count) for count in SWEEPS]
    with factorizing(solver=OnePass()):
        found = {"one pass": measure(swept("one pass", 1), model, out / "one-pass")}
    found |= {run.label: measure(run, model, out) for run in runs}
    first, second = dense_figures(model, out)
    rows = [["dense", f"{first:.2f}", f"{second:.2f}", "", ""]]
    for label, line in found.items():
        first, second = line["perplexity"]
        rows.append([label, f"{first:.2f}", f"{second:.2f}", f"{line['loss']:.4f}", f"{line['seconds']:.0f}"])
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
