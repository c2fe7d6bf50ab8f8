"""One exact sweep against the matrix products it is made of, its growth, and its peak memory.

    python -m benchmarks.sweep --sizes 1024 2048 4096

Full Gram matrix, float32, block 128. The products counted, for a size x size weight:

- 2.5 large products (size x size by size x size): C B H in the left step; the update of R H in the
  right step; half a one for the gradient in the core step;
- 13 block products (2 size^2 block flops each): C B, D, A C B and E, A (C B H) in the left step;
  A C, G'G and G'(R H), G dB in the right step; the residual of the loss (two); the two of the
  core's gradient; B H B' (two) and A'A dC in the core step. They are timed as one batched product.

Sweep and products are timed in turn, and the median ratio is reported. Peak memory is that of a
process of its own, over (W + XXt), less what the process held before the arrays were made.
"""

from __future__ import annotations

import argparse
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from armorfact import Pattern, Problem, blocks, factorize, sparsegpt
from armorfact.gram import FullGram
from armorfact.solvers.exact import sweep

Array = Any
Clock = Callable[[Callable[[], object]], float]

BLOCK = 128
LARGE, SMALL = 2.5, 13


def layer(size: int) -> tuple[np.ndarray, np.ndarray]:
    """A random weight and the Gram matrix of correlated inputs."""
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((size, size), dtype=np.float32)
    inputs = rng.standard_normal((size, 2 * size), dtype=np.float32)
    inputs[1:] += 0.5 * inputs[:-1]
    return weight, inputs @ inputs.T


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def products_seconds(weight: Array, gram: Array, wrapper: Array, seconds: Clock = seconds) -> float:
    """The time of the products alone: one of each kind, times how often it occurs."""
    large = seconds(lambda: weight @ gram)
    small = seconds(lambda: wrapper @ blocks.split_rows(weight, wrapper.shape[-1]))
    return LARGE * large + SMALL * small


def measure(size: int, repeats: int) -> tuple[float, float, float]:
    """Median seconds of a sweep, of its products, and the median ratio."""
    weight, gram = layer(size)
    problem = Problem(weight, FullGram(gram), Pattern(2, 4), BLOCK, BLOCK)
    factors = problem.identity_wrapped(sparsegpt(weight, gram))
    factors, _ = sweep(problem, factors)
    pairs = [
        (seconds(lambda: sweep(problem, factors)), products_seconds(weight, gram, factors.left)) for _ in range(repeats)
    ]
    sweeps, products = zip(*pairs, strict=True)
    ratios = [a / b for a, b in pairs]
    return statistics.median(sweeps), statistics.median(products), statistics.median(ratios)


def peak_memory(size: int) -> float:
    """Peak memory of `factorize` in a fresh process, in multiples of (W + XXt)."""
    command = [sys.executable, "-m", "benchmarks.sweep", "--memory-of", str(size)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def print_peak(size: int) -> None:
    from armorfact_hf.free_memory import peak_memory as own_peak
    from benchmarks.streamed import forget_peak

    factorize(np.eye(8, dtype=np.float32), block=8, max_sweeps=1)
    weight, gram = layer(size)
    before = forget_peak() - weight.nbytes - gram.nbytes
    factorize(weight, gram, block=BLOCK, max_sweeps=3)
    print((own_peak() - before) / (weight.nbytes + gram.nbytes))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[1024, 2048, 4096])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--memory-of", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory_of:
        print_peak(arguments.memory_of)
        return
    print("| size | sweep s | its products s | ratio | growth: sweep, products | peak memory / (W + XXt) |")
    print("|---|---|---|---|---|---|")
    last: tuple[int, float, float] | None = None
    for size in arguments.sizes:
        swept, products, ratio = measure(size, arguments.repeats)
        growth = (
            "" if last is None else f"{_exponent(last, size, swept, 1):.2f}, {_exponent(last, size, products, 2):.2f}"
        )
        print(
            f"| {size} | {swept:.3f} | {products:.3f} | {ratio:.2f} | {growth} | {peak_memory(size):.1f} |", flush=True
        )
        last = (size, swept, products)


def _exponent(last: tuple[int, float, float], size: int, value: float, which: int) -> float:
    return math.log(value / last[which]) / math.log(size / last[0])


if __name__ == "__main__":
    main()
