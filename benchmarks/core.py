"""What int8 costs: perplexity and bits a weight of cores, and of wrappers as well, beside bfloat16 and dense int4.

    python -m benchmarks.core

SmolLM2-135M, every third decoder block, layers factorized alone in 10 sweeps, as for "settings" of
`benchmarks.results`; all runs change the same layers. Dense int4 is the weight rounded to nearest, in groups of 128
inputs (the last one of a row may be shorter), each with a scale and a least number in 16 bits. Figures are kept in
--out, as there.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from armorfact_hf.data.load_model import load_model
from armorfact_hf.pruning.config import PruneConfig
from armorfact_hf.pruning.fitting import fitting_layers
from benchmarks.kept import kept
from benchmarks.results import SUBSET, Run, dense_figures, measure, one_in, perplexities

GROUP, BITS, EVERY = 128, 4, 3
CORE = {"core_dtype": "int8"}
RUNS = (
    Run("2:4, bfloat16 core", SUBSET, every=EVERY),
    Run("2:4, int8 core", {**SUBSET, **CORE}, every=EVERY),
    Run("2:4, int8 core and wrappers", {**SUBSET, **CORE, "wrapper_dtype": "int8"}, every=EVERY),
)


def rounded(weight: Tensor, bits: int = BITS, group: int = GROUP) -> Tensor:
    """W with every group of consecutive inputs of a row rounded to 2**bits numbers, evenly from its least to its most.

    Args:
        weight: (d_out, d_in), floating; scale and least number of a group are rounded to bfloat16.
    """
    return torch.cat([_rounded_group(part, 2**bits - 1) for part in weight.float().split(group, dim=1)], dim=1)


def _rounded_group(part: Tensor, most: int) -> Tensor:
    least, greatest = part.amin(1, keepdim=True), part.amax(1, keepdim=True)
    scale = ((greatest - least) / most).bfloat16().float().clamp(min=1e-30)
    least = least.bfloat16().float()
    return ((part - least) / scale).round().clamp(0, most) * scale + least


def bits_of(d_in: int, bits: int = BITS, group: int = GROUP) -> float:
    """Bits a weight, those of scales and least numbers among them."""
    return bits + 32 * -(-d_in // group) / d_in


def dense_int4(model: str, out: Path) -> dict[str, Any]:
    """Perplexities with the layers of the runs rounded to int4, and bits a weight; measured unless they are kept."""
    return kept(out, "int4", [model, EVERY, GROUP, BITS], lambda: _dense_int4(model))


def _dense_int4(model: str) -> dict[str, Any]:
    loaded = load_model(model, "bfloat16")
    layers, _ = fitting_layers(loaded.model, PruneConfig(**SUBSET, include=one_in(loaded.model, EVERY)))
    for layer in layers:
        layer.module.weight.data.copy_(rounded(layer.weight))
    sizes = [layer.shape[0] * layer.shape[1] for layer in layers]
    bits = sum(size * bits_of(layer.shape[1]) for size, layer in zip(sizes, layers, strict=True)) / sum(sizes)
    return {"perplexity": perplexities(loaded), "bits": bits}


def main() -> None:
    """Print a line a form of the layers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo:smollm2")
    parser.add_argument("--out", type=Path, default=Path("pruned-results"))
    arguments = parser.parse_args()
    print("| the layers | bits a weight | gensim-enwiki | qasper | mean layer loss |")
    print("|---|---|---|---|---|")
    first, second = dense_figures(arguments.model, arguments.out)
    print(f"| dense, bfloat16 | 16 | {first:.2f} | {second:.2f} | |", flush=True)
    for run in RUNS:
        found = measure(run, arguments.model, arguments.out)
        first, second = found["perplexity"]
        print(
            f"| {run.label} | {16 * found['bytes']:.2f} | {first:.2f} | {second:.2f} | {found['loss']:.5f} |",
            flush=True,
        )
    found = dense_int4(arguments.model, arguments.out)
    first, second = found["perplexity"]
    print(f"| dense, int4 in groups of {GROUP} | {found['bits']:.2f} | {first:.2f} | {second:.2f} | |")


if __name__ == "__main__":
    main()
