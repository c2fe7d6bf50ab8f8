"""What wrappers in int8 cost one real layer, by the size of their blocks.

    python -m benchmarks.wrappers

The layer of `benchmarks.layers`, a query projection of Gemma 3 270M (1024 x 640), in bfloat16, factorized in 10 sweeps
for H + diag(H), and then rounded: the core alone, A and B plainly with one scale a row, and as `quantize_wrappers`
does.
"""

from __future__ import annotations

import argparse

import torch

from armorfact import Result, factorize, quantize_core, quantize_wrappers
from benchmarks.layers import load

LAYER = "model.layers.8.self_attn.q_proj"


def main() -> None:
    """Print a line a size of blocks: relative losses, and bits a weight without and with wrappers in int8."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", nargs="+", type=int, default=[16, 32, 64, 128])
    arguments = parser.parse_args()
    weight, gram = (torch.from_numpy(array) for array in load(LAYER))
    weight, gram = weight.bfloat16(), gram + gram.diagonal().diag()
    print("| block | factorized | core in int8 | A, B plainly | A, B in turn | beside the core's | bits a weight |")
    print("|---|---|---|---|---|---|---|")
    for block in arguments.blocks:
        given = factorize(weight, gram, block=block, max_sweeps=10)
        core = quantize_core(given, weight, gram)
        both = quantize_wrappers(core, weight, gram)
        plain = both.initial_loss / (both.weight_loss or 1.0)
        losses = (given.relative_loss, core.relative_loss, plain, both.relative_loss)
        bits = ", ".join(f"{bits_of(found):.2f}" for found in (core, both))
        told = " | ".join(f"{loss:.5f}" for loss in losses)
        print(f"| {block} | {told} | {100 * (both.loss / core.loss - 1):+.1f}% | {bits} |", flush=True)


def bits_of(result: Result) -> float:
    """Bits a weight of all that is stored."""
    d_out, d_in = result.core.shape
    return 8 * result.nbytes / (d_out * d_in)


if __name__ == "__main__":
    main()
