"""The tables of docs/results.md: what pruning whole models costs in perplexity, by method and by setting.

    python -m benchmarks.results methods --model demo:smollm2
    python -m benchmarks.results settings
    python -m benchmarks.results shrinkage
    python -m benchmarks.results whole

Every run prunes the model in bfloat16 and measures perplexity on two texts. Its figures are kept in a JSON file in
--out, and are not measured again; the pruned weights are not kept. "settings" and "shrinkage" prune every third
decoder block, in 10 sweeps a layer, so that many settings can be compared. Only "methods" matches blocks.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from armorfact_hf.data.load_model import Loaded, load_model
from armorfact_hf.evaluation.measure import Evaluation, perplexity_of
from armorfact_hf.pruning.config import PruneConfig
from armorfact_hf.report.record import Report
from armorfact_hf.runs.prune_to_folder import Calibration, prune_to_folder

TEXTS = [Evaluation("demo:gensim-enwiki"), Evaluation("demo:qasper")]
EVERY_THIRD = (f"re:model.layers.({'|'.join(map(str, range(0, 30, 3)))})\\.",)
SUBSET = {"include": EVERY_THIRD, "baselines": (), "sweeps": 10, "refine": None}
# Solved to the solver's own stopping rule: three sweeps that each gain less than a thousandth.
PAPER = {"objective": "nowag", "init": "nowag", "sweeps": 150, "rtol": 1e-3, "baselines": (), "refine": None}


@dataclass(frozen=True)
class Run:
    """A line of a table: its label, the settings that differ from the defaults, and the windows calibrated on."""

    label: str
    settings: dict[str, Any] = field(default_factory=dict)
    windows: int = 16

    def key(self, model: str) -> str:
        """A file name for the figures of these settings."""
        settings = json.dumps([model, self.settings, self.windows], sort_keys=True)
        return hashlib.sha256(settings.encode()).hexdigest()[:16]


def methods() -> Iterator[Run]:
    """The default beside the one-shot methods and the paper's objective, over the whole model."""
    for method in ("magnitude", "wanda", "nowag", "sparsegpt"):
        yield Run(method, {"method": method, "baselines": ()})
    yield Run("paper's objective", PAPER)
    yield Run("layers only", {"refine": None, "sweeps": 20, "baselines": ()})
    yield Run("armorfact")
    yield Run("block priced", {"block": "priced"})


def settings() -> Iterator[Run]:
    """One setting changed at a time."""
    changes: list[tuple[str, dict[str, Any]]] = [
        ("10 sweeps and block auto", {}),
        ("block priced", {"block": "priced"}),
        ("propagate dense", {"propagate": "dense"}),
        ("target output", {"target": "output"}),
        ("objective diagonal", {"objective": "diagonal"}),
        ("objective nowag", {"objective": "nowag"}),
        *((f"block {size}", {"block": size}) for size in (32, 64, 96)),
        *((f"{count} sweeps", {"sweeps": count}) for count in (5, 20, 40)),
    ]
    for label, change in changes:
        yield Run(label, {**SUBSET, **change})


def shrinkage() -> Iterator[Run]:
    """The weight λ of the Gram matrix's own diagonal against the number of calibration tokens."""
    for windows in (16, 4, 64):
        for weight in (1.0, 0.5, 2.0, 0.1, 0.0):
            yield Run(f"λ = {weight}, {windows * 2}k tokens", {**SUBSET, "shrinkage": weight}, windows)


def whole() -> Iterator[Run]:
    """One setting changed at a time, over the whole model, where the errors of all blocks add up."""
    yield Run("default", {"refine": None})
    changes: list[tuple[str, dict[str, Any]]] = [
        ("target output", {"target": "output"}),
        ("propagate dense", {"propagate": "dense"}),
        ("λ = 0.5", {"shrinkage": 0.5}),
        ("λ = 2", {"shrinkage": 2.0}),
    ]
    for label, change in changes:
        yield Run(label, {**change, "baselines": (), "refine": None})


def measure(run: Run, model: str, out: Path) -> dict[str, Any]:
    """The figures of a run, measured unless they are kept in ``out``."""
    path = out / f"{run.key(model)}.json"
    if not path.exists():
        folder, calibration = path.with_suffix(""), Calibration(windows=run.windows)
        report = prune_to_folder(load_model(model, "bfloat16"), folder, PruneConfig(**run.settings), calibration)
        path.write_text(json.dumps(_figures(run, load_model(str(folder)), report)), encoding="utf-8")
        shutil.rmtree(folder)
    return json.loads(path.read_text(encoding="utf-8"))


def _figures(run: Run, loaded: Loaded, report: Report) -> dict[str, Any]:
    totals = report.totals
    return {
        "label": run.label,
        "perplexity": [perplexity_of(loaded, text).perplexity for text in TEXTS],
        "loss": report.mean_loss(),
        "bytes": totals.bytes / totals.dense_bytes,
        "overhead": totals.wrapper_overhead,
        "seconds": totals.seconds,
    }


def dense_figures(model: str, out: Path) -> list[float]:
    """The dense model's perplexities."""
    path = out / f"dense-{model.replace(':', '-').replace('/', '-')}.json"
    if not path.exists():
        loaded = load_model(model, "bfloat16")
        path.write_text(json.dumps([perplexity_of(loaded, text).perplexity for text in TEXTS]), encoding="utf-8")
    return json.loads(path.read_text(encoding="utf-8"))


def main() -> None:
    """Print the table asked for, a line as soon as its run is measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tables = {"methods": methods, "settings": settings, "shrinkage": shrinkage, "whole": whole}
    parser.add_argument("table", choices=tables)
    parser.add_argument("--model", default="demo:smollm2")
    parser.add_argument("--out", type=Path, default=Path("pruned-results"))
    parser.add_argument("--only", default="", help="labels, separated by commas; all by default")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    print("| run | gensim-enwiki | qasper | mean layer loss | bytes of dense | wrappers | seconds |")
    print("|---|---|---|---|---|---|---|")
    first, second = dense_figures(arguments.model, arguments.out)
    print(f"| dense | {first:.2f} | {second:.2f} | | 1 | | |", flush=True)
    for run in tables[arguments.table]():
        if arguments.only and run.label not in arguments.only.split(","):
            continue
        found = measure(run, arguments.model, arguments.out)
        first, second = found["perplexity"]
        print(
            f"| {run.label} | {first:.2f} | {second:.2f} | {found['loss']:.4f} | {found['bytes']:.3f} "
            f"| {found['overhead']:.3f} | {found['seconds']:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
