"""Reads experts' packed 2:4 cores straight from memory, those of all experts that were chosen in one call or launch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from armorfact_hf.layers.kernels import cpu_experts, cpu_packed, cpu_panels
from armorfact_hf.layers.kernels.bf16 import beats_dense
from armorfact_hf.layers.kernels.cpu_packed import FEW_TOKENS, LIKE, launching
from armorfact_hf.layers.strategies.packed import refusal
from armorfact_hf.layers.strategies.strategy import Kind

# Rows of an expert that was chosen, on average, up to which all go at once; any number in bfloat16 on a CPU that
# multiplies pairs of them. On a GPU a product is bound by arithmetic above, which dense tensor cores do best, and
# launches are few for the work in them: reasoned, not measured yet.
MOST_ROWS = {"cpu": FEW_TOKENS, "cuda": 256}
# Rows of an expert, beyond whole tiles, that are faster without one (benchmarks/expert_speed.py).
FEW_BESIDE_TILES = 32
# Parts that one call takes in tiles: their B x, 8 MiB at a width of 2048, stay in a cache.
MOST_PARTS = 32

Stack = tuple[Tensor, Tensor, Tensor | None, Tensor | None]  # values, positions, left and right of experts' layers


def runs(kind: Kind, counts: Sequence[int]) -> bool:
    """Whether layers of a kind can be run so, and it is worth it for so many tokens of each expert.

    The time grows with all rows, and that of one expert after another with the experts: so their ratio decides.
    """
    if refusal(kind) is not None:
        return False
    if kind.device.type == "cpu" and _in_tiles(kind.stored):
        return True
    chosen = sum(count > 0 for count in counts)
    return sum(counts) <= MOST_ROWS.get(kind.device.type, -1) * chosen


def _in_tiles(dtype: torch.dtype) -> bool:
    """Whether many rows of an expert stand side by side, see `cpu_panels`, for such kept values."""
    return dtype == torch.bfloat16 and beats_dense()


def product(x: Tensor, counts: Sequence[int], stacks: Sequence[Stack]) -> Tensor:
    """y = A C B x of the experts' layers, (rows, d_out of all stacks), those of several stacks side by side.

    Args:
        x: (rows, d_in), the tokens of one expert after those of another. counts: how many rows each expert has.
        stacks: the layers, experts first; all of one d_in and of the same dtypes. Kept values may be in int8.
    """
    return _on_gpu(x, counts, stacks) if x.is_cuda else _on_cpu(x, counts, stacks)


def _on_gpu(x: Tensor, counts: Sequence[int], stacks: Sequence[Stack]) -> Tensor:
    # Imports without Triton, but is of no use where there is no GPU.
    from armorfact_hf.layers.kernels import triton_experts

    return torch.cat([triton_experts.product(x, counts, *stack) for stack in stacks], dim=-1)


def _on_cpu(x: Tensor, counts: Sequence[int], stacks: Sequence[Stack]) -> Tensor:
    (rows, d_in), x = x.shape, x.contiguous()
    widths = [values.shape[1] for values, *_ in stacks if values is not None]
    y = x.new_empty(rows, sum(widths))
    if not y.numel():
        return y
    kept = next(values.dtype for values, *_ in stacks if values is not None)
    held = [[tensor if tensor is None else tensor.contiguous() for tensor in stack] for stack in stacks]
    columns = np.cumsum([0, *widths])
    few, tiles = (
        np.concatenate([_parts(stack, given, column) for stack, column in zip(held, columns, strict=False)])
        for given in _few_and_tiles(counts, _in_tiles(kept))
    )
    like, sizes = LIKE[x.dtype], (x.data_ptr(), y.data_ptr(), rows, d_in, y.shape[1])
    with launching():
        if len(few):
            cpu_experts.expert_rows(like, LIKE[kept], *sizes, few)
        for first in range(0, len(tiles), MOST_PARTS):
            some = tiles[first : first + MOST_PARTS]
            cpu_panels.tile_rows(like, *sizes, _rows_at_once(some[:, 4].sum()), some)
    return y


def _few_and_tiles(counts: Sequence[int], in_tiles: bool) -> tuple[np.ndarray, np.ndarray]:
    """An expert, the first of some rows of x that are its own, and how many, (…, 3): few, and up to a tile of them."""
    few: list[tuple[int, int, int]] = []
    tiles: list[tuple[int, int, int]] = []
    first = 0
    for expert, count in enumerate(counts):
        whole = count // cpu_panels.TILE * cpu_panels.TILE if in_tiles else 0
        tiles += [(expert, first + at, cpu_panels.TILE) for at in range(0, whole, cpu_panels.TILE)]
        if whole < count:
            rest = (expert, first + whole, count - whole)
            (tiles if in_tiles and count - whole > FEW_BESIDE_TILES else few).append(rest)
        first += count
    return np.array(few, dtype=np.int64).reshape(-1, 3), np.array(tiles, dtype=np.int64).reshape(-1, 3)


def _rows_at_once(rows: int) -> int:
    """How many of all rows of cores a thread takes at a time, so that each has some."""
    return max(cpu_panels.TILE, min(cpu_packed.MOST_ROWS, -(-rows // torch.get_num_threads())))


def _parts(stack: Sequence[Tensor | None], given: np.ndarray, column: int) -> np.ndarray:
    """(parts, 10), what experts of a stack are given, see `_few_and_tiles`, as `cpu_experts.expert_rows` takes it."""
    hit, found = given[:, 0], np.empty((len(given), 10), dtype=np.int64)
    for place, tensor in enumerate(stack):
        found[:, place] = 0 if tensor is None else tensor.data_ptr() + hit * tensor.stride(0) * tensor.element_size()
    values, _, left, right = stack
    found[:, 4] = 0 if values is None else values.shape[1]
    found[:, 5:7] = [0 if tensor is None else tensor.shape[-1] for tensor in (left, right)]
    found[:, 7:9], found[:, 9] = given[:, 1:], column
    return found


def biases(bias: Tensor, counts: Sequence[int]) -> Tensor:
    """For each row its expert's bias, (rows, d_out)."""
    return bias.repeat_interleave(torch.tensor(counts, device=bias.device), dim=0)
