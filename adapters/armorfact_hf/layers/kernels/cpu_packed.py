"""Launches the compiled kernels of `cpu`: the product with a packed 2:4 core on a CPU, and its unpacking by rows."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache

import numba
import numpy as np
import torch
from torch import Tensor, set_num_threads  # as it is now: a server may put one in its place that does nothing

from armorfact_hf.layers.kernels import cpu as kernels

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Above this many tokens panels beat vectors (benchmarks/execution.py).
FEW_TOKENS = 24
# Rows that a thread takes at a time: many enough to pay for laying out a panel, few enough to keep their sums near.
MOST_ROWS = 512
# numba knows no 16-bit float: float16 goes as int16, bfloat16 as uint16.
_STORED = {torch.float16: torch.int16, torch.bfloat16: torch.uint16}
LIKE = {dtype: torch.empty(1, dtype=_STORED.get(dtype, dtype), device="cpu").numpy() for dtype in (*DTYPES, torch.int8)}
# Values, positions, left and right of a layer, and the scales of these two where they are int8.
Stored = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]
# numba's simplest pool of threads aborts the process when two threads of Python enter it at once.
_one_at_a_time = threading.Lock()


def packed_product(
    x: Tensor,
    values: Tensor,
    positions: Tensor,
    left: Tensor | None,
    right: Tensor | None,
    left_scales: Tensor | None = None,
    right_scales: Tensor | None = None,
) -> Tensor:
    """y = A C B x (tokens, d_out), for the rows of x (tokens, d_in) and a packed 2:4 core.

    Args:
        x: any strides, in one of `DTYPES`. values, positions: the core, see `armorfact.Core`, in that dtype or int8.
        left, right: blocks of A and B in the dtype of x, each may be None.
        left_scales, right_scales: for at most `FEW_TOKENS` tokens blocks may be in int8, between these scales
            (2, channels) of rows and of columns.
    """
    if x.shape[0] > FEW_TOKENS:
        return _many_tokens(x, values, positions, left, right)
    return FewTokens([(values, positions, left, right, left_scales, right_scales)])(x)


class FewTokens:
    """What `packed_product` makes of x with each of several layers, side by side: (tokens, d_out of all).

    Made once for factors that stay where they are in memory: to describe them takes longer than some layers' product.

    Args:
        layers: the factors of each, as there; the values of all in one dtype, and so are the blocks.

    Raises:
        ValueError: they are not, or positions are no bytes: the kernel goes by addresses alone.
    """

    def __init__(self, layers: Sequence[Stored]) -> None:
        self.held = [[_contiguous(tensor) for tensor in layer] for layer in layers]  # so that no address goes stale
        self.parts = np.array([_described(*layer) for layer in self.held])
        values, positions = {layer[0].dtype for layer in layers}, {layer[1].dtype for layer in layers}
        blocks = {side.dtype for layer in layers for side in layer[2:4] if side is not None}
        if len(values) > 1 or positions != {torch.uint8} or len(blocks) > 1:
            raise ValueError(
                "expected kept values of one dtype, positions in uint8 and A and B in one dtype, got "
                + ", ".join(map(str, (*values, *positions, *blocks)))
            )
        self.values_like = LIKE[next(iter(values))]
        self.blocks_dtype = next(iter(blocks), None)
        self.d_out = sum(layer[0].shape[0] for layer in layers)

    def __call__(self, x: Tensor) -> Tensor:
        """y for at most `FEW_TOKENS` tokens x."""
        tokens, d_in = x.shape
        y = x.new_empty(tokens, self.d_out)
        if y.numel():
            x = x.contiguous()
            with launching():
                like, blocks_like = LIKE[x.dtype], LIKE[self.blocks_dtype or x.dtype]
                kernels.few_tokens(
                    like, self.values_like, blocks_like, x.data_ptr(), y.data_ptr(), tokens, d_in, self.parts
                )
        return y


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return tensor if tensor is None else tensor.contiguous()


def _described(
    values: Tensor, positions: Tensor, left: Tensor | None, right: Tensor | None, *scales: Tensor | None
) -> list[int]:
    """A layer as `kernels.few_tokens` takes it."""
    factors = [0 if tensor is None else tensor.data_ptr() for tensor in (values, positions, left, right)]
    sizes = [0 if tensor is None else tensor.shape[-1] for tensor in (left, right)]
    return [*factors, values.shape[0], *sizes, *(0 if tensor is None else tensor.data_ptr() for tensor in scales)]


def _many_tokens(x: Tensor, values: Tensor, positions: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    """Tokens lie side by side between the wrappers, which therefore transpose on the way."""
    tokens = x.shape[0]
    if right is None:
        inputs = x.T
    else:
        count, size, _ = right.shape
        inputs = torch.bmm(right, x.view(tokens, count, size).permute(1, 2, 0).to(right.dtype)).view(-1, tokens)
    z = x.new_empty(values.shape[0], tokens, dtype=torch.float32)
    rows = min(MOST_ROWS, -(-values.shape[0] // torch.get_num_threads()))
    with launching():
        kernels.many_tokens(
            inputs.float().contiguous().numpy(), _array(values), positions.reshape(-1).numpy(), z.numpy(), rows
        )
    if left is None:
        return z.T.to(x.dtype).contiguous()
    count, size, _ = left.shape
    y = torch.bmm(z.view(count, size, tokens).permute(0, 2, 1).to(left.dtype), left.transpose(1, 2))
    return y.transpose(0, 1).reshape(tokens, -1).to(x.dtype)


@contextmanager
def launching() -> Iterator[None]:
    """Inside, a compiled kernel may be called: no other thread calls one, and it has as many threads as PyTorch."""
    _take_threads()
    with _one_at_a_time:
        yield


def core_with_zeros(values: Tensor, positions: Tensor) -> Tensor:
    """The rows of a 2:4 core with their zeros, (rows, d_in)."""
    panel = values.new_empty(values.shape[0], 2 * values.shape[1])
    with launching():
        kernels.unpack(_array(values), positions.reshape(-1).numpy(), _array(panel))
    return panel


def _array(tensor: Tensor) -> np.ndarray:
    """The same memory for numba."""
    tensor = tensor.detach().contiguous()
    return tensor.view(_STORED.get(tensor.dtype, tensor.dtype)).numpy()


@cache
def _launch_threads() -> None:
    """numba's pool, once: it may share OpenMP with PyTorch, and then sets the number of threads for both."""
    wanted = torch.get_num_threads()
    numba.get_num_threads()
    if torch.get_num_threads() != wanted:
        set_num_threads(wanted)


def _take_threads() -> None:
    """As many threads as PyTorch may use, of those that numba has."""
    _launch_threads()
    wanted = min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS)
    if numba.get_num_threads() != wanted:
        numba.set_num_threads(wanted)
