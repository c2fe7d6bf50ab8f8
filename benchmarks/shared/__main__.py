"""One right wrapper for projections that share their input, [Wq; Wk; Wv] and [Wgate; Wup], or one each.

    python -m benchmarks.shared perplexity --model demo:smollm2
    python -m benchmarks.shared perplexity --model demo:gemma3-270m
    python -m benchmarks.shared speed

"perplexity" prunes every third decoder block in bfloat16, layers only, 10 sweeps, by the default blocks; then with one
B for all that are given the same input, of at most the same bytes. Figures are kept in --out and not measured again.
"speed" times one token through random layers on this CPU, in bfloat16.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from benchmarks.evidence.tables import table
from benchmarks.kept import chosen
from benchmarks.results import dense_figures
from benchmarks.shared.quality import FORMS, loss_table, measured, quality_table
from benchmarks.shared.speed import GROUPS, HEADER, speed_row


def main(given: Sequence[str] | None = None) -> None:
    """Measure what is missing, then print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["perplexity", "speed"])
    parser.add_argument("--model", default="demo:smollm2")
    parser.add_argument("--every", type=int, default=3, help="one decoder block in so many is pruned")
    parser.add_argument("--forms", default="", help="some of them, separated by commas; all by default")
    parser.add_argument("--out", type=Path, default=Path("pruned-results"))
    arguments = parser.parse_args(given)
    if arguments.what == "speed":
        print(table(HEADER, [speed_row(name) for name in GROUPS]))
        return
    forms = list(dict.fromkeys(["one each", *chosen(arguments.forms, list(FORMS))]))
    dense = dense_figures(arguments.model, arguments.out)
    found = {form: measured(arguments.model, form, arguments.every, arguments.out) for form in forms}
    print(quality_table(found, dense), loss_table(found), sep="\n\n")


if __name__ == "__main__":
    main()
