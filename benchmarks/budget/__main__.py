"""The bytes of all wrappers shared out among layers by what each costs the model, or each layer given the same share.

    python -m benchmarks.budget --model demo:smollm2
    python -m benchmarks.budget --model demo:smollm2 --refine block
    python -m benchmarks.budget --model demo:gemma3-270m

Every third decoder block is pruned in bfloat16 by 10 sweeps, layers only or, with --refine block, blocks matched too:
by the default sizes, and by sizes of at most the same entries in all, chosen greedily where each layer is priced by the
KL divergence that a solve of a few sweeps foretells ("budget by KL"), or by its relative loss ("budget by loss").
Figures are kept in --out and not measured again.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from armorfact_hf.runs.prune_to_folder import Calibration
from benchmarks.budget.forms import DEFAULT, Blocks, blocks_of, blocks_table, foretold_table, given_blocks, rate_table
from benchmarks.budget.prices import PRICES, solved_layers
from benchmarks.results import dense_figures
from benchmarks.shared.quality import kept, loss_table, measure, measured, quality_table


def main(given: Sequence[str] | None = None) -> None:
    """Measure what is missing, then print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo:smollm2")
    parser.add_argument("--every", type=int, default=3, help="one decoder block in so many is pruned")
    parser.add_argument("--forms", default=",".join(PRICES), help="some of them, separated by commas; or nothing")
    parser.add_argument("--refine", choices=["block", "none"], default="none", help="whether blocks are matched")
    parser.add_argument("--out", type=Path, default=Path("pruned-results"))
    arguments = parser.parse_args(given)
    model, every, out = arguments.model, arguments.every, arguments.out
    refine = None if arguments.refine == "none" else arguments.refine
    out.mkdir(parents=True, exist_ok=True)
    solved = solved_layers(model, every, out)
    blocks = {form: blocks_of(form, solved) for form in (DEFAULT, *PRICES)}
    print(foretold_table(blocks, solved), blocks_table(blocks), rate_table(solved), sep="\n\n", flush=True)
    forms = [form for form in PRICES if form in arguments.forms.split(",")]
    found = {DEFAULT: measured(model, "one each", every, out, refine=refine)}
    found |= {form: _measured(model, every, blocks[form], out, refine) for form in forms}
    print("", quality_table(found, dense_figures(model, out)), loss_table(found), sep="\n\n")


def _measured(model: str, every: int, blocks: Blocks, out: Path, refine: str | None) -> dict[str, Any]:
    key = [model, every, sorted(blocks.items()), *([refine] if refine else [])]
    return kept(out, "budget", key, lambda: measure(model, every, Calibration(), given_blocks(blocks), refine))


if __name__ == "__main__":
    main()
