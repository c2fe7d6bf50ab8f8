"""The operators of PyTorch that a pruned layer calls, so that `torch.compile` sees each of them as one step.

    armorfact::packed_linear    y = A C B x, C a packed 2:4 core that is never unpacked in memory
    armorfact::unpacked_linear  y = C x, the core unpacked for the time of the product; any N:M

The first has a CPU form, with kernels compiled by numba, and a CUDA form; the second runs anywhere. They are no part of
autograd: `FactorizedLinear` takes another way where gradients are asked for.
"""

from __future__ import annotations

import threading
from functools import cache

import numba
import numpy as np
import torch
from torch import Tensor

from armorfact import Core, Pattern
from armorfact_hf.layers.execution import PACKED_DTYPES, PAIR
from armorfact_hf.layers.kernels import cpu as kernels

# Above this many tokens panels beat vectors (benchmarks/execution.py).
FEW_TOKENS = 24
# Rows that a thread takes at a time: many enough to pay for laying out a panel, few enough to keep their sums near.
MOST_ROWS = 512
# Bytes of the core that are unpacked at a time: an allocator hands such a piece out again without clearing it anew.
UNPACKED_BYTES = 1 << 22
# numba knows no 16-bit float: float16 goes as int16, bfloat16 as uint16.
_STORED = {torch.float16: torch.int16, torch.bfloat16: torch.uint16}
_LIKE = {dtype: torch.empty(1, dtype=_STORED.get(dtype, dtype)).numpy() for dtype in PACKED_DTYPES}

_library = torch.library.Library("armorfact", "DEF")
_library.define("packed_linear(Tensor x, Tensor values, Tensor positions, Tensor? left, Tensor? right) -> Tensor")
_library.define("unpacked_linear(Tensor x, Tensor values, Tensor positions, int keep, int group) -> Tensor")
# numba's simplest pool of threads aborts the process when two threads of Python enter it at once.
_one_at_a_time = threading.Lock()


def block_product(blocks: Tensor, x: Tensor) -> Tensor:
    """diag(blocks) applied to every row of x (tokens, blocks * size): (tokens, blocks * size)."""
    count, size, _ = blocks.shape
    rows = x.view(x.shape[0], count, size).transpose(0, 1)
    return torch.bmm(rows, blocks.transpose(1, 2)).transpose(0, 1).reshape(x.shape[0], count * size)


def _cpu_packed_linear(
    x: Tensor, values: Tensor, positions: Tensor, left: Tensor | None, right: Tensor | None
) -> Tensor:
    (tokens, d_in), d_out = x.shape, values.shape[0]
    _take_threads()
    if tokens > FEW_TOKENS:
        return _cpu_many(x, values, positions, left, right)
    y = x.new_empty(tokens, d_out)
    if not y.numel():
        return y
    held = [tensor if tensor is None else tensor.contiguous() for tensor in (x, values, positions, left, right)]
    addresses = [0 if tensor is None else tensor.data_ptr() for tensor in held]
    sizes = [0 if tensor is None else tensor.shape[-1] for tensor in (left, right)]
    with _one_at_a_time:
        kernels.few_tokens(_LIKE[x.dtype], *addresses, y.data_ptr(), tokens, d_out, d_in, *sizes)
    return y


def _cpu_many(x: Tensor, values: Tensor, positions: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    """Tokens lie side by side between the wrappers, which therefore transpose on the way."""
    tokens = x.shape[0]
    if right is None:
        inputs = x.T
    else:
        count, size, _ = right.shape
        inputs = torch.bmm(right, x.view(tokens, count, size).permute(1, 2, 0).to(right.dtype)).view(-1, tokens)
    z = x.new_empty(values.shape[0], tokens, dtype=torch.float32)
    rows = min(MOST_ROWS, -(-values.shape[0] // torch.get_num_threads()))
    with _one_at_a_time:
        kernels.many_tokens(
            inputs.float().contiguous().numpy(), _array(values), positions.view(-1).numpy(), z.numpy(), rows
        )
    if left is None:
        return z.T.to(x.dtype).contiguous()
    count, size, _ = left.shape
    y = torch.bmm(z.view(count, size, tokens).permute(0, 2, 1).to(left.dtype), left.transpose(1, 2))
    return y.transpose(0, 1).reshape(tokens, -1).to(x.dtype)


def _unpacked_linear(x: Tensor, values: Tensor, positions: Tensor, keep: int, group: int) -> Tensor:
    """A panel of rows at a time, so that the core with its zeros never stands in memory as a whole."""
    core = Core(values, positions, Pattern(keep, group), x.shape[1])
    rows = max(1, UNPACKED_BYTES // (x.shape[1] * values.element_size()))
    if rows >= values.shape[0]:
        return x @ _rows(core, 0, values.shape[0]).T
    y = x.new_empty(x.shape[0], values.shape[0])
    for first in range(0, values.shape[0], rows):
        panel = _rows(core, first, min(first + rows, values.shape[0]))
        y[:, first : first + rows] = x @ panel.T
    return y


def _rows(core: Core, first: int, end: int) -> Tensor:
    """Rows first..end of a core, with their zeros."""
    if core.pattern != PAIR or core.values.device.type != "cpu" or core.values.dtype not in _LIKE:
        return Core(core.values[first:end], core.packed[first:end], core.pattern, core.columns).dense()
    panel = core.values.new_empty(end - first, core.columns)
    _take_threads()
    with _one_at_a_time:
        kernels.unpack(_array(core.values), core.packed.view(-1).numpy(), first, _array(panel))
    return panel


def _cuda_packed_linear(
    x: Tensor, values: Tensor, positions: Tensor, left: Tensor | None, right: Tensor | None
) -> Tensor:
    from armorfact_hf.layers.kernels.triton_packed import packed_product

    y = packed_product(x, values, positions, right)
    return y if left is None else block_product(left, y)


def _fake_packed_linear(
    x: Tensor, values: Tensor, positions: Tensor, left: Tensor | None, right: Tensor | None
) -> Tensor:
    return x.new_empty(x.shape[0], values.shape[0])


def _fake_unpacked_linear(x: Tensor, values: Tensor, positions: Tensor, keep: int, group: int) -> Tensor:
    return x.new_empty(x.shape[0], values.shape[0])


_library.impl("packed_linear", _cpu_packed_linear, "CPU")
_library.impl("packed_linear", _cuda_packed_linear, "CUDA")
_library.impl("unpacked_linear", _unpacked_linear, "CompositeExplicitAutograd")
torch.library.register_fake("armorfact::packed_linear", _fake_packed_linear, lib=_library)
torch.library.register_fake("armorfact::unpacked_linear", _fake_unpacked_linear, lib=_library)


def _array(tensor: Tensor) -> np.ndarray:
    """The same memory for numba."""
    tensor = tensor.detach().contiguous()
    return tensor.view(_STORED.get(tensor.dtype, tensor.dtype)).numpy()


@cache
def _launch_threads() -> None:
    """numba's pool, once: it may share OpenMP with PyTorch, and then sets the number of threads for both."""
    wanted = torch.get_num_threads()
    numba.get_num_threads()
    torch.set_num_threads(wanted)


def _take_threads() -> None:
    """As many threads as PyTorch may use, of those that numba has."""
    _launch_threads()
    wanted = min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS)
    if numba.get_num_threads() != wanted:
        numba.set_num_threads(wanted)
