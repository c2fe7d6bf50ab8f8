"""How long Llama 70B takes on 1, 8 and 64 workers.

python -m benchmarks.scale --save costs.json
python -m benchmarks.scale --costs costs.json --gbit 100 --faster 1000
"""

from __future__ import annotations

import argparse
from pathlib import Path

from armorfact_hf.pruning.config import PruneConfig
from benchmarks.scale.costs import SHRINK, Costs, measure
from benchmarks.scale.simulation import Run

LENGTH = 2048


def main() -> None:
    """Measure or read costs, simulate, print."""
    asked = _arguments()
    costs = measure(asked.length or LENGTH) if asked.costs is None else Costs.read(asked.costs)
    if asked.save is not None:
        costs.write(asked.save)
    _print_costs(costs)
    print(f"\nWorkers {asked.faster:g} times as fast, lines of {asked.gbit:g} Gbit/s, {asked.windows} windows.")
    print("Hours of a block, part by part and together; days of all blocks; how many times as fast as one worker:\n")
    print("| workers | matching | windows | layers | matching | spreading | block | all blocks | times as fast |")
    print("|---|---|---|---|---|---|---|---|---|")
    for matched in (True, False):
        matching = PruneConfig().matching if matched else None
        one, *runs = (
            Run(costs.enlarged(asked.faster), workers, asked.windows, matching, asked.gbit * 1e9 / 8)
            for workers in (1, *asked.workers)
        )
        for run in runs:
            _print_run(run, one.days())


def _print_costs(costs: Costs) -> None:
    print(f"Seconds of one thread of an {costs.machine}; widths over {SHRINK}, windows of {costs.length} tokens.")
    print("\n| | seconds |\n|---|---|")
    print(f"| a window through the block | {costs.forward:.3f} |\n| a step of block matching | {costs.tuning:.3f} |")
    for name, layer in costs.layers.items():
        shape = " × ".join(map(str, layer.shape))
        if layer.gram:
            print(f"| Gram matrix of {name.rpartition('.')[2]}'s input, a window | {layer.gram:.3f} |")
        print(f"| {name.rpartition('.')[2]}, {shape} | {layer.prune:.2f} |")


def _print_run(run: Run, alone: float) -> None:
    parts = run.block(1)
    cells = [f"{parts[name] / 3600:.3g}" for name in ("windows", "layers", "matching", "spreading")]
    total, days = sum(parts.values()) / 3600, run.days()
    how = "yes" if run.matching else "no"
    print(f"| {run.workers} | {how} | {' | '.join(cells)} | {total:.3g} | {days:.3g} | {alone / days:.1f} |")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--costs", type=Path, help="A file of costs; measured here without.")
    parser.add_argument("--save", type=Path, help="Keep the costs in a file.")
    parser.add_argument("--workers", type=lambda text: [int(x) for x in text.split(",")], default=[1, 8, 64])
    parser.add_argument("--windows", type=int, default=128)
    parser.add_argument("--length", type=int, help="Tokens of a window, where costs are measured: 2048 by default.")
    parser.add_argument("--gbit", type=float, default=10.0, help="Of each machine's line, in either direction.")
    parser.add_argument("--faster", type=float, default=1.0, help="Workers so many times as fast as measured.")
    asked = parser.parse_args()
    if asked.costs is not None and asked.length is not None:
        parser.error("--length would not act: the windows are those of --costs")
    return asked


if __name__ == "__main__":
    main()
