"""Random layers and inputs, and how far a product may be from the exact one."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from armorfact import BlockDiagonal, Core, Pattern
from armorfact_hf.layers.execution import PACKED, Execution
from armorfact_hf.layers.linear import FactorizedLinear
from armorfact_hf.layers.strategies.strategy import PAIR

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ON_CPU = ("packed", "unpacked", "dense")


def random_core(d_out: int, d_in: int, pattern: Pattern, generator: torch.Generator) -> Core:
    """An N:M core; a quarter of what it could keep is zero, so that groups hold from none to N values."""
    dense = torch.randn(d_out, d_in, generator=generator)
    dense = torch.where(pattern.top_mask(torch.rand(dense.shape, generator=generator)), dense, 0)
    return Core.from_dense(torch.where(torch.rand(dense.shape, generator=generator) < 0.25, 0, dense), pattern)


def random_layer(
    d_out: int = 12,
    d_in: int = 36,
    block: tuple[int, int] | None = (6, 12),
    dtype: torch.dtype = torch.float32,
    bias: bool = True,
    pattern: Pattern = PAIR,
    seed: int = 0,
) -> FactorizedLinear:
    generator = torch.Generator().manual_seed(seed)
    layer = FactorizedLinear(d_out, d_in, pattern, block, bias)
    core = random_core(d_out, d_in, pattern, generator)
    layer.values.copy_(core.values)
    layer.positions.copy_(core.packed)
    for tensor in (layer.left, layer.right, layer.bias):
        if tensor is not None:
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
    return layer.to(dtype)


def int8_layer(
    d_out: int = 12,
    d_in: int = 36,
    block: tuple[int, int] = (6, 12),
    dtype: torch.dtype = torch.float32,
    bias: bool = True,
    pattern: Pattern = PAIR,
    seed: int = 0,
) -> FactorizedLinear:
    """A layer whose kept values are whole numbers, the extremes among them."""
    layer = random_layer(d_out, d_in, block, dtype, bias, pattern, seed)
    whole = (60 * layer.values.float()).round().clamp(-128, 127).to(torch.int8)
    left, right = BlockDiagonal(layer.left / 60), BlockDiagonal(layer.right)
    return FactorizedLinear.of(replace(layer.core, values=whole), left, right, layer.bias)


def whole_layer(
    d_out: int = 12,
    d_in: int = 36,
    block: tuple[int, int] = (6, 12),
    dtype: torch.dtype = torch.float32,
    bias: bool = True,
    pattern: Pattern = PAIR,
    seed: int = 0,
) -> FactorizedLinear:
    """A layer whose wrappers are whole numbers too, between scales of any size and sign."""
    layer, generator = int8_layer(d_out, d_in, block, dtype, bias, pattern, seed), torch.Generator().manual_seed(seed)

    def whole(blocks: Tensor, size: float) -> BlockDiagonal:
        scales = size * torch.randn(2, *blocks.shape[:2], generator=generator).to(dtype)
        return BlockDiagonal(torch.randint(-127, 128, blocks.shape, generator=generator, dtype=torch.int8), *scales)

    return FactorizedLinear.of(layer.core, whole(layer.left, 1 / 64), whole(layer.right, 1 / 16), layer.bias)


def random_inputs(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def in_float64(layer: FactorizedLinear) -> FactorizedLinear:
    return copy.deepcopy(layer).to(torch.float64)


def reference(layer: FactorizedLinear, x: Tensor) -> Tensor:
    """The dense product in float64, of the weight and bias as they are stored."""
    exact = in_float64(layer)
    return functional.linear(x.double(), exact.weight, exact.bias)


def sizes_of_terms(layer: FactorizedLinear, x: Tensor) -> Tensor:
    """|A| |C| |B| |x| + |bias|: what the rounding of each entry is relative to."""
    exact = in_float64(layer)
    for tensor in (*exact.parameters(), *exact.buffers()):
        tensor.abs_()
    return functional.linear(x.double().abs(), exact.weight, exact.bias)


def assert_rounded(y: Tensor, layer: FactorizedLinear, x: Tensor, dtype: torch.dtype | None = None) -> None:
    """y is the exact product but for at most eight roundings to the dtype and a float32 sum over a row."""
    dtype = dtype or x.dtype
    wanted = reference(layer, x)
    assert y.dtype == dtype and y.shape == wanted.shape
    terms = layer.in_features + sum(layer.block or ())
    relative = 4 * torch.finfo(dtype).eps + terms * torch.finfo(torch.float32).eps / 2
    bound = relative * sizes_of_terms(layer, x) + torch.finfo(dtype).tiny
    assert ((y.double() - wanted).abs() <= bound).all(), (y.double() - wanted).abs().max().item()


def runs(layer: FactorizedLinear, strategy: str, x: Tensor) -> Tensor:
    with torch.no_grad():
        return layer.use_(Execution.always(strategy))(x)


def factorized(layer: FactorizedLinear, x: Tensor, text: str = "") -> Tensor:
    """What the operator makes of a layer's factors, its bias left out."""
    held = layer.values, layer.positions, layer.left, layer.right, layer.merged, layer.compressed
    pattern = layer.pattern
    scales = layer.left_scales, layer.right_scales
    return torch.ops.armorfact.factorized_linear(x, *held, pattern.keep, pattern.group, text, *scales)


def packed_operator(layer: FactorizedLinear, x: Tensor) -> Tensor:
    y = factorized(layer, x, PACKED.text)
    return y if layer.bias is None else y + layer.bias
