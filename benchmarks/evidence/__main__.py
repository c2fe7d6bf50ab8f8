"""The evidence of docs/evidence.md.

    python -m benchmarks.evidence proxy --model demo:smollm2       does a layer's loss foretell what the model loses?
    python -m benchmarks.evidence weights --model demo:smollm2     other objectives, minimized: token and output weights
    python -m benchmarks.evidence outputs --model demo:smollm2     output weights, in a third of the decoder blocks
    python -m benchmarks.evidence ablation --model demo:smollm2    one pass on a fixed mask, and 1 to 100 sweeps
    python -m benchmarks.evidence whole --model demo:smollm2       the ablation over whole models: perplexity
    python -m benchmarks.evidence tasks FOLDER...                  accuracy of pruned folders beside their dense model
    python -m benchmarks.evidence texts FOLDER...                  and their divergence from it, by kind of text

Every figure is kept in --out as it is found, so the same command continues a run that was stopped; with --seconds,
proxy, weights and ablation stop by themselves (and say so with exit code 75), to share a machine.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.evidence.experiment import Budget, Experiment, Settings, Unfinished
from benchmarks.evidence.methods import METHODS, OBJECTIVES, OURS, SWEEPS
from benchmarks.evidence.outputs import output_table
from benchmarks.evidence.plots import write_plots
from benchmarks.evidence.tables import correlation_table, error_table, fact_table, ratio_table
from benchmarks.evidence.tasks import CHOICE_TASKS, task_table
from benchmarks.evidence.texts import text_table
from benchmarks.evidence.whole import whole_table

UNFINISHED = 75
# Gemma's vocabulary of 262k words makes its head dearer than its blocks: every fourth position
# gets a label and is scored there.
SETTINGS = {"demo:gemma3-270m": {"labels": 4, "every": 4}}
SETS = {"proxy": METHODS, "weights": OBJECTIVES, "ablation": SWEEPS}


def main() -> None:
    """Measure what is missing, then print the tables."""
    arguments = _arguments()
    out, model = arguments.out, arguments.model
    name = model.replace(":", "-").replace("/", "-")
    if arguments.what == "tasks":
        print(task_table(arguments.folders, arguments.tasks, arguments.limit, out))
        return
    if arguments.what == "texts":
        print(text_table(arguments.folders, out))
        return
    if arguments.what == "whole":
        print(whole_table(model, out / "whole", arguments.third))
        return
    if arguments.what == "outputs":
        print(output_table(model, out / "outputs"))
        return
    settings = Settings(**SETTINGS.get(model, {"every": 2}))
    experiment = Experiment(model, out / name, settings, Budget(arguments.seconds), arguments.depths)
    try:
        experiment.measure(SETS[arguments.what])
    except Unfinished:
        print("The seconds allowed have passed; the same command goes on from here.", file=sys.stderr)
        raise SystemExit(UNFINISHED) from None
    _show(arguments.what, experiment.figures, arguments.plots, name)


def _show(what: str, figures: dict, plots: Path | None, name: str) -> None:
    methods = list(SETS[what])
    print(ratio_table(figures, methods, "20 sweeps" if what == "ablation" else OURS))
    if what == "proxy":
        print("\nEvery method, then what each correlation is above that of H:\n")
        print(correlation_table(figures, methods), correlation_table(figures, methods, less="H"), sep="\n\n")
        print("\nWithout magnitude pruning:\n")
        print(correlation_table(figures, methods[1:]), error_table(figures, methods), fact_table(figures), sep="\n\n")
        if plots is not None:
            write_plots(plots, name.removeprefix("demo-"), figures, methods)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=[*SETS, "outputs", "whole", "tasks", "texts"])
    parser.add_argument("folders", nargs="*", type=Path, help="for tasks and texts: what `armorfact prune` wrote")
    parser.add_argument("--model", default="demo:smollm2")
    parser.add_argument("--out", type=Path, default=Path("evidence"))
    parser.add_argument("--seconds", type=float, help="stop after so long; everything measured is kept")
    parser.add_argument(
        "--depths", nargs="+", type=int, help="of the three decoder blocks, measure layers of these only"
    )
    parser.add_argument("--plots", type=Path, help="a folder for the scatter plots of proxy")
    parser.add_argument("--third", action="store_true", help="whole: prune every third decoder block only")
    parser.add_argument("--tasks", nargs="+", default=CHOICE_TASKS, metavar="TASK", help=", ".join(CHOICE_TASKS))
    parser.add_argument("--limit", type=int, default=500, help="questions a task")
    return parser.parse_args()


if __name__ == "__main__":
    main()
