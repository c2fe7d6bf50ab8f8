"""Reads experts' packed 2:4 cores straight from memory, those of all experts that were chosen in one call or launch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from armorfact_hf.layers.kernels import cpu_experts as kernels
from armorfact_hf.layers.kernels.bf16 import beats_dense
from armorfact_hf.layers.kernels.cpu_packed import FEW_TOKENS, LIKE, launching
from armorfact_hf.layers.packed import refusal
from armorfact_hf.layers.strategy import Kind

# Rows of an expert that was chosen, on average, up to which all go at once; in bfloat16 on a CPU that multiplies pairs
# of them, `MOST_IN_PAIRS` (benchmarks/expert_speed.py). On a GPU a product is bound by arithmetic above, which dense
# tensor cores do best, and launches are few for the work in them: reasoned, not measured yet.
MOST_ROWS = {"cpu": FEW_TOKENS, "cuda": 256}
MOST_IN_PAIRS = 64

Stack = tuple[Tensor, Tensor, Tensor | None, Tensor | None]  # values, positions, left and right of experts' layers


def runs(kind: Kind, counts: Sequence[int]) -> bool:
    """Whether layers of a kind can be run so, and the experts have few enough tokens that it is worth it.

    The time grows with all rows, and that of one expert after another with the experts: so their ratio decides.
    """
    chosen = sum(count > 0 for count in counts)
    return sum(counts) <= _most_rows(kind) * chosen and refusal(kind) is None


def _most_rows(kind: Kind) -> int:
    in_pairs = kind.device.type == "cpu" and kind.dtype == kind.stored == torch.bfloat16 and beats_dense()
    return MOST_IN_PAIRS if in_pairs else MOST_ROWS.get(kind.device.type, -1)


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
    tokens = np.array(counts)
    hit = np.flatnonzero(tokens)
    own = np.stack([np.cumsum(tokens)[hit] - tokens[hit], tokens[hit]], axis=1)
    columns = np.cumsum([0, *widths])
    parts = np.concatenate([_parts(stack, hit, own, column) for stack, column in zip(held, columns, strict=False)])
    with launching():
        kernels.expert_rows(LIKE[x.dtype], LIKE[kept], x.data_ptr(), y.data_ptr(), rows, d_in, y.shape[1], parts)
    return y


def _parts(stack: Sequence[Tensor | None], hit: np.ndarray, own: np.ndarray, column: int) -> np.ndarray:
    """(experts that were hit, 10), a stack as `kernels.expert_rows` takes it."""
    found = np.empty((len(hit), 10), dtype=np.int64)
    for place, tensor in enumerate(stack):
        found[:, place] = 0 if tensor is None else tensor.data_ptr() + hit * tensor.stride(0) * tensor.element_size()
    values, _, left, right = stack
    found[:, 4] = 0 if values is None else values.shape[1]
    found[:, 5:7] = [0 if tensor is None else tensor.shape[-1] for tensor in (left, right)]
    found[:, 7:9], found[:, 9] = own, column
    return found


def biases(bias: Tensor, counts: Sequence[int]) -> Tensor:
    """For each row its expert's bias, (rows, d_out)."""
    return bias.repeat_interleave(torch.tensor(counts, device=bias.device), dim=0)
