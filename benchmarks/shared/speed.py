"""One token through projections of the same input: a right wrapper each, or one for all."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import cast

import torch
from torch import Tensor, nn

from armorfact import BlockDiagonal, Core
from armorfact_hf.bench.timing import time_side_by_side
from armorfact_hf.layers.execution import Execution
from armorfact_hf.layers.joined import JoinedLinears
from armorfact_hf.layers.linear import FactorizedLinear
from armorfact_hf.layers.strategies.strategy import PAIR
from armorfact_hf.pruning.config import PruneConfig
from armorfact_hf.pruning.fitting import fitting_block
from benchmarks.execution import COPIES_BYTES, copies
from benchmarks.shared.sharing import Shape, Sharing, common_block

# Rows of the projections, and their inputs: SmolLM2-135M, then the sizes of Llama 3 8B.
GROUPS: dict[str, tuple[Sequence[int], int]] = {
    "q, k, v of 576": ((576, 192, 192), 576),
    "gate, up of 576": ((1536, 1536), 576),
    "q, k, v of 4096": ((4096, 1024, 1024), 4096),
    "gate, up of 4096": ((14336, 14336), 4096),
}
PACKED = Execution.always("packed")


class InTurn(nn.ModuleList):
    """The outputs of several layers, called one after the other."""

    def forward(self, x: Tensor) -> list[Tensor]:
        return [layer(x) for layer in self]


def blocks_of(rows: Sequence[int], d_in: int) -> tuple[list[Shape], Shape]:
    """The default blocks of each projection, and those of all with one B, of no more bytes."""
    shapes = [(d_out, d_in) for d_out in rows]
    each = [cast(Shape, fitting_block(shape, PruneConfig())[0]) for shape in shapes]
    return each, common_block(shapes, each, Sharing())


@torch.inference_mode()
def decode_seconds(rows: Sequence[int], d_in: int, held: int = COPIES_BYTES) -> dict[str, float]:
    """Seconds by form for one token in bfloat16, weights coming from memory.

    Args:
        held: bytes of the copies that are passed through, as dense float32 weights.
    """
    each, common = blocks_of(rows, d_in)
    count = max(2, held // (4 * sum(rows) * d_in))
    apart = [_copies(d_out, d_in, block, count) for d_out, block in zip(rows, each, strict=True)]
    groups, stacked = list(zip(*apart, strict=True)), _copies(sum(rows), d_in, common, count)
    forms: dict[str, Sequence[nn.Module]] = {
        "one B each, in turn": [InTurn(group) for group in groups],
        "one B each, one launch": [JoinedLinears(group) for group in groups],
        "one B, as a layer": stacked,
        "one B, one launch": [JoinedLinears([layer]) for layer in stacked],
    }
    return time_side_by_side(forms, torch.randn(1, d_in).bfloat16())


def _copies(d_out: int, d_in: int, block: Shape, count: int) -> list[FactorizedLinear]:
    """So many layers of the same random factors, each with memory of its own."""
    weight = torch.randn(d_out, d_in)
    core = Core.from_dense((weight * PAIR.top_mask(weight.abs())).bfloat16(), PAIR)
    left, right = (
        BlockDiagonal((torch.randn(d // size, size, size) / size**0.5).bfloat16())
        for d, size in zip((d_out, d_in), block, strict=True)
    )
    return cast(list[FactorizedLinear], copies(FactorizedLinear.of(core, left, right), count, PACKED))


def speed_row(name: str, held: int = COPIES_BYTES, repeats: int = 7) -> list[str]:
    """A line of the table: the blocks, median microseconds by form, and the gain of one B, both in one launch.

    The gain is the median over the repeats, with the smallest and the largest: other work on the machine moves it.
    """
    rows, d_in = GROUPS[name]
    each, common = blocks_of(rows, d_in)
    found = [decode_seconds(rows, d_in, held) for _ in range(repeats)]
    gains = [line["one B each, one launch"] / line["one B, one launch"] for line in found]
    times = [f"{median(line[form] for line in found) * 1e6:,.0f}" for form in found[0]]
    gain = f"{median(gains):.2f} ({min(gains):.2f} to {max(gains):.2f})"
    return [name, ", ".join(str(size) for size, _ in each), f"{common[0]}x{common[1]}", *times, gain]


HEADER = ["projections", "blocks, one B each", "blocks, one B"]
HEADER += ["one B each, in turn", "one B each, one launch", "one B, as a layer", "one B, one launch", "gain"]
