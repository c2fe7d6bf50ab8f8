"""How long a Gram matrix takes by panels of its lower triangle, over the time of the whole product.

    python -m benchmarks.moments

The inputs of 2048 tokens in float32, added to a sum in float64; the quickest of several turns, side by side.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from armorfact_hf.model.moments import add_gram_
from benchmarks.evidence.tables import table

SIZES = 576, 896, 1536, 2048, 4864
PANELS = 128, 256, 512, 1024
TOKENS, TURNS = 2048, 5


def whole_(total: Tensor, x: Tensor) -> None:
    """As `add_gram_`, in one product."""
    total += x.T @ x


def ratios(size: int) -> tuple[float, list[float]]:
    """Seconds of the whole product, and those of each width of panel over them."""
    x, total = torch.randn(TOKENS, size), torch.zeros(size, size, dtype=torch.float64)
    ways: list[Callable[[Tensor, Tensor], None]] = [whole_, *(partial(add_gram_, panel=panel) for panel in PANELS)]
    quickest = [float("inf")] * len(ways)
    for _ in range(TURNS):
        for k, add in enumerate(ways):
            began = time.perf_counter()
            add(total, x)
            quickest[k] = min(quickest[k], time.perf_counter() - began)
    whole, *by_panels = quickest
    return whole, [seconds / whole for seconds in by_panels]


def main() -> None:
    """The command."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    rows = []
    for size in SIZES:
        whole, by_panels = ratios(size)
        rows.append([str(size), f"{1e3 * whole:.0f}", *(f"{ratio:.2f}" for ratio in by_panels)])
    print(table(["inputs", "whole, ms", *(f"panels of {panel}" for panel in PANELS)], rows))


if __name__ == "__main__":
    main()
