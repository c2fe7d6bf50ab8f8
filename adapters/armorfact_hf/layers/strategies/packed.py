"""Reads the kept values of a 2:4 core and their positions straight from memory: for few tokens, bound by memory."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec

import numba
import torch
from llvmlite import binding
from torch import Tensor

from armorfact_hf.layers.kernels.blocks import block_product
from armorfact_hf.layers.kernels.cpu_packed import DTYPES, FEW_TOKENS, FewTokens, Stored, packed_product
from armorfact_hf.layers.strategies.strategy import PAIR, Kind, Operands

HAS_TRITON = find_spec("triton") is not None


def refusal(kind: Kind) -> str | None:
    """Why there is no packed product for such a core on its device."""
    if kind.pattern != PAIR or kind.dtype not in DTYPES or kind.stored not in (kind.dtype, torch.int8):
        between = "" if kind.stored == kind.dtype else f" between wrappers in {kind.dtype}"
        return (
            "the packed product is for 2:4 cores in 16 or 32 bits, or in int8 between such wrappers, got "
            f"{kind.pattern} in {kind.stored}{between}: use 'unpacked'"
        )
    device = kind.device.type
    if device not in ("cpu", "cuda", "meta"):
        return f"the packed product runs on CPUs and on CUDA devices, got {device}: use 'unpacked'"
    if device == "cuda" and not HAS_TRITON:
        return "the packed product on a GPU is written in Triton: pip install triton, or use 'unpacked'"
    if device != "cuda" and kind.dtype == torch.float16 and not _cpu_has_half():
        return "the packed product in float16 needs a processor that converts it (F16C): use 'unpacked'"
    return None


@cache
def _cpu_has_half() -> bool:
    """Whether the processor that numba compiles for converts float16: x86 since 2012, and all others."""
    if platform.machine().lower() not in ("x86_64", "amd64", "i386", "i686"):
        return True
    features: str | None = vars(numba.config)["CPU_FEATURES"]
    if features is not None:
        return "+f16c" in features
    return bool(binding.get_host_cpu_features().get("f16c"))


def prepare(operands: Operands) -> dict[str, Tensor]:
    """Nothing."""
    return {}


def product(x: Tensor, operands: Operands) -> Tensor:
    """y = A C B x; C is never unpacked in memory."""
    if not x.is_cuda:
        return packed_product(x, *_stored(operands if x.shape[0] <= FEW_TOKENS else operands.widened))
    values, positions, left, right, *_ = operands.widened
    # Imports without Triton, but is of no use where there is no GPU.
    from armorfact_hf.layers.kernels.triton_packed import packed_product as on_gpu

    y = on_gpu(x, values, positions, right)
    return y if left is None else block_product(left, y)


def products(x: Tensor, layers: Sequence[Operands]) -> Tensor:
    """The `product` of x with each of several layers, side by side; a few tokens on a CPU go through all at once."""
    if x.device.type == "cpu" and x.shape[0] <= FEW_TOKENS:
        return FewTokens([_stored(each) for each in layers])(x)
    return torch.cat([product(x, each) for each in layers], dim=-1)


def _stored(layer: Operands) -> Stored:
    return (*layer[:4], layer.left_scales, layer.right_scales)
