"""The tables of docs/results.md: what pruning whole models costs in perplexity, by method and by setting.

    python -m benchmarks.results methods --model demo:smollm2
    python -m benchmarks.results settings
    python -m benchmarks.results shrinkage
    python -m benchmarks.results whole

Every run prunes the model in bfloat16 and measures perplexity on two texts. Its figures are kept in a JSON file in
--out, and are not measured again; the pruned weights are not kept. "settings" and "shrinkage" prune every third
decoder block, in 10 sweeps a layer, so that many settings can be compared. Only "methods" matches blocks: its last
column has the divergence on the windows kept aside before and after the last blocks are tuned together.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from armorfact_hf.data.calibration import Calibration
from armorfact_hf.data.load_model import Loaded, load_model
from armorfact_hf.evaluation.measure import Evaluation, perplexity_of
from armorfact_hf.model.structure import decoder_blocks
from armorfact_hf.pruning.config import PruneConfig
from armorfact_hf.runs.prune_to_folder import prune_to_folder
from benchmarks.kept import chosen, kept, place_of

TEXTS = [Evaluation("demo:gensim-enwiki"), Evaluation("demo:qasper")]
SUBSET = {"sweeps": 10, "refine": None}  # of every third decoder block
# Solved to the solver's own stopping rule: three sweeps that each gain less than a thousandth.
PAPER = {"objective": "nowag", "init": "nowag", "sweeps": 150, "rtol": 1e-3, "refine": None}


@dataclass(frozen=True)
class Run:
    """A line of a table.

    Args:
        label: what it is called. settings: those that differ from the defaults; no losses of baselines are computed.
        windows: calibrated on. every: one decoder block in so many is pruned.
    """

    label: str
    settings: dict[str, Any] = field(default_factory=dict)
    windows: int = 16
    every: int = 1

    @property
    def calibration(self) -> Calibration:
        """The tokens."""
        return Calibration(windows=self.windows)

    @property
    def config(self) -> PruneConfig:
        """The settings, but for the decoder blocks."""
        return PruneConfig(baselines=(), **self.settings)


def methods() -> Iterator[Run]:
    """The default beside the one-shot methods and the paper's objective, over the whole model."""
    for method in ("magnitude", "wanda", "nowag", "sparsegpt"):
        yield Run(method, {"method": method})
    yield Run("paper's objective", PAPER)
    yield Run("layers only", {"refine": None})
    yield Run("armorfact")
    yield Run("block priced", {"block": "priced"})


def settings() -> Iterator[Run]:
    """One setting changed at a time."""
    changes: list[tuple[str, dict[str, Any]]] = [
        ("10 sweeps and block auto", {}),
        ("block priced", {"block": "priced"}),
        ("propagate dense", {"propagate": "dense"}),
        ("target output", {"target": "output"}),
        ("objective normalized", {"objective": "normalized"}),
        ("objective diagonal", {"objective": "diagonal"}),
        ("objective nowag", {"objective": "nowag"}),
        *((f"block {size}", {"block": size}) for size in (32, 64, 96)),
        *((f"{count} sweeps", {"sweeps": count}) for count in (5, 20, 40)),
    ]
    for label, change in changes:
        yield Run(label, {**SUBSET, **change}, every=3)


def shrinkage() -> Iterator[Run]:
    """The weight λ of the Gram matrix's own diagonal against the number of calibration tokens."""
    for windows in (16, 4, 64):
        for weight in (1.0, 0.5, 2.0, 0.1, 0.0):
            yield Run(f"λ = {weight}, {windows * 2}k tokens", {**SUBSET, "shrinkage": weight}, windows, every=3)


def whole() -> Iterator[Run]:
    """One setting changed at a time, over the whole model, where the errors of all blocks add up."""
    yield Run("layers only", {"refine": None})
    changes: list[tuple[str, dict[str, Any]]] = [
        ("target output", {"target": "output"}),
        ("propagate dense", {"propagate": "dense"}),
        ("λ = 0.5", {"shrinkage": 0.5}),
        ("λ = 2", {"shrinkage": 2.0}),
    ]
    for label, change in changes:
        yield Run(label, {**change, "refine": None})


def measure(run: Run, model: str, out: Path) -> dict[str, Any]:
    """The figures of a run, measured unless they are kept in ``out``; one that was stopped goes on."""
    key = [model, run.config.to_dict(), asdict(run.calibration), run.every]
    folder = place_of(out, "run", key).with_suffix("")
    found = kept(out, "run", key, lambda: _figures(run, model, folder))
    shutil.rmtree(folder, ignore_errors=True)
    return found


def _figures(run: Run, model: str, folder: Path) -> dict[str, Any]:
    loaded, config = load_model(model, "bfloat16"), run.config
    if run.every > 1:
        config = replace(config, include=one_in(loaded.model, run.every))
    report = prune_to_folder(loaded, folder, config, run.calibration)
    totals, tail = report.totals, report.blocks[-1:]
    return {
        "perplexity": perplexities(load_model(str(folder))),
        "loss": report.mean_loss(),
        "bytes": totals.bytes / totals.dense_bytes,
        "overhead": totals.wrapper_overhead,
        "seconds": totals.seconds,
        "tail": [[tuned.before, tuned.after] for tuned in tail if tuned.through is not None],
    }


def one_in(model: nn.Module, every: int) -> tuple[str, ...]:
    """What `PruneConfig` includes for the layers of one decoder block in so many."""
    prefix, blocks = decoder_blocks(model)
    chosen = "|".join(map(str, range(0, len(blocks), every)))
    return (f"re:{prefix}\\.({chosen})\\.",)


def dense_figures(model: str, out: Path) -> list[float]:
    """The dense model's perplexities, measured unless they are kept in ``out``."""
    return kept(out, "dense", model, lambda: perplexities(load_model(model, "bfloat16")))


def perplexities(loaded: Loaded) -> list[float]:
    """On both texts."""
    return [perplexity_of(loaded, text).perplexity for text in TEXTS]


def main() -> None:
    """Print the table asked for, a line as soon as its run is measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tables = {"methods": methods, "settings": settings, "shrinkage": shrinkage, "whole": whole}
    parser.add_argument("table", choices=tables)
    parser.add_argument("--model", default="demo:smollm2")
    parser.add_argument("--out", type=Path, default=Path("pruned-results"))
    parser.add_argument("--only", default="", help="labels, separated by commas; all by default")
    arguments = parser.parse_args()
    runs = {run.label: run for run in tables[arguments.table]()}
    print("| run | gensim-enwiki | qasper | mean layer loss | bytes of dense | wrappers | seconds | tail, nats |")
    print("|---|---|---|---|---|---|---|---|")
    labels = chosen(arguments.only, list(runs))
    first, second = dense_figures(arguments.model, arguments.out)
    print(f"| dense | {first:.2f} | {second:.2f} | | 1 | | | |", flush=True)
    for label in labels:
        found = measure(runs[label], arguments.model, arguments.out)
        first, second = found["perplexity"]
        tail = "".join(f"{before:.3f} to {after:.3f}" for before, after in found["tail"])
        print(
            f"| {label} | {first:.2f} | {second:.2f} | {found['loss']:.4f} | {found['bytes']:.3f} "
            f"| {found['overhead']:.3f} | {found['seconds']:.0f} | {tail} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
