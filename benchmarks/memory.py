"""The peak memory of factorizing one layer, in copies of its weight and of its Gram matrix.

    python -m benchmarks.memory
    python -m benchmarks.memory --shapes 1024x8192 8192x1024 --sweeps 1

Every part runs in a process of its own, on Torch's CPU tensors: a bfloat16 weight and a float32 Gram matrix, as they
come to `armorfact.factorize`, or the layer and its float64 statistics, as they come to `prune_layer`. What is given is
left out of the peak. Linux counts it, after a small layer has brought all that is loaded and compiled.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable

import torch
from torch import nn

from armorfact import factorize, sparsegpt
from armorfact_hf.free_memory import peak_memory
from armorfact_hf.model.moments import Moments
from armorfact_hf.model.structure import Layer
from armorfact_hf.pruning.config import PruneConfig
from armorfact_hf.pruning.layer import prune_layer
from benchmarks.streamed import forget_peak

SMALL = (64, 64)
TOKENS = 64
BLOCK = 64
TARGETS = {"prune_layer": "weight", "prune_layer, target output": "output"}
PARTS = ("sparsegpt", "factorize", *TARGETS)


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["1024x4096", "4096x1024"], help="d_out x d_in of layers")
    parser.add_argument("--sweeps", type=int, default=2)
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)  # in the process that is measured
    return parser


def work(part: str, shape: tuple[int, int], sweeps: int) -> Callable[[], object]:
    """What is measured, with what it is given made already."""
    d_out, d_in = shape
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(d_out, d_in, generator=generator).to(torch.bfloat16)
    inputs = torch.randn(d_in, TOKENS, generator=generator, dtype=torch.float64 if part in TARGETS else None)
    gram = inputs @ inputs.T
    gram.diagonal().add_(TOKENS)
    if part == "sparsegpt":
        return lambda: sparsegpt(weight, gram)
    if part == "factorize":
        return lambda: factorize(weight, gram, block=BLOCK, max_sweeps=sweeps)
    linear = nn.Linear(d_in, d_out, bias=False, dtype=torch.bfloat16)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    layer = Layer("layer", linear, 0, (BLOCK, BLOCK))
    moments = Moments(gram, gram.clone() if TARGETS[part] == "output" else None, TOKENS)
    config = PruneConfig(sweeps=sweeps, baselines=(), target=TARGETS[part])
    return lambda: prune_layer(layer, moments, config)


def measured(part: str, shape: tuple[int, int], sweeps: int) -> int:
    """Bytes at the peak, beyond what was held before."""
    work(part, SMALL, sweeps)()
    act = work(part, shape, sweeps)
    before = forget_peak()
    act()
    return peak_memory() - before


def main() -> None:
    settings = arguments().parse_args()
    shapes = [tuple(map(int, shape.split("x"))) for shape in settings.shapes]
    if settings.part:
        warnings.simplefilter("ignore")  # a made-up Gram matrix may need more damping
        print(json.dumps(measured(settings.part, shapes[0], settings.sweeps)))
        return
    print("| part | layer | peak, MB | of W + H in float32 |\n|---|---|---|---|")
    for part in PARTS:
        for d_out, d_in in shapes:
            peak = _in_a_process(part, f"{d_out}x{d_in}", settings.sweeps)
            copies = peak / (4 * (d_out * d_in + d_in * d_in))
            print(f"| {part} | {d_out} x {d_in} | {peak / 1e6:.0f} | {copies:.2f} |", flush=True)


def _in_a_process(part: str, shape: str, sweeps: int) -> int:
    command = [sys.executable, "-m", "benchmarks.memory", "--part", part, "--shapes", shape, "--sweeps", str(sweeps)]
    # Large arrays go back to the system as soon as they are freed.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(1 << 16)}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return int(json.loads(done.stdout.splitlines()[-1]))


if __name__ == "__main__":
    main()
