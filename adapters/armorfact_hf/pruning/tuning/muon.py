"""Muon over tiles: the optimizer of a pruned model's factors, for matching and for recovery.

Adam moves every entry by about the rate, each by itself. Muon (Jordan et al. 2024, "Muon: an optimizer for hidden
layers in neural networks") moves a matrix by the orthogonal one nearest to its momentum, so that every direction in it
moves alike, however much the gradient favours a few. Here that is done for each tile of at most 64 × 64, a block of A
or B or a piece of the kept values of C as they are packed: whole factors of large layers would take longer than the
gradient does, and gain hardly more (docs/results.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import torch
from torch import Tensor, nn

MOMENTUM = 0.8  # the share of it that a step keeps
TILE = 64
COEFFICIENTS = 3.4445, -4.7750, 2.0315  # Jordan's: five steps bring all but tiny singular values to 0.7 to 1.2
ITERATIONS = 5


def unit(factor: Tensor) -> float:
    """What a rate of 1 is for a factor: the root mean square of its entries.

    A step moves entries by the rate on average, whatever the gradient, and weights are ten times as large in one model
    as in another. So rates are shares of what they move.
    """
    return float(factor.detach().float().square().mean().sqrt())


class Muon:
    """Momentum, made orthogonal tile by tile, over named parameters; the last step can be taken back.

    Args:
        parameters: float32 or float64, of two dimensions or more; each holds its gradient, zero at first, from here on.
            What the rate of a step is multiplied with is the `unit` of each as it is now.

    Attributes:
        gradients: those that the parameters hold.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self.parameters = dict(parameters)
        self.units = {name: unit(parameter) for name, parameter in parameters.items()}
        self.momentum = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
        self.before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        self.gradients = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
        for name, parameter in self.parameters.items():
            parameter.grad = self.gradients[name]

    def zero_gradients_(self) -> None:
        """Forget the gradients."""
        for gradient in self.gradients.values():
            gradient.zero_()

    @torch.no_grad()
    def step_(self, rate: float) -> None:
        """Move along the gradients; tiles without any, as of an expert that no token reached, stay."""
        for name, parameter in self.parameters.items():
            self.before[name].copy_(parameter)
            self.momentum[name].lerp_(self.gradients[name], 1 - MOMENTUM)
            way = direction(self.momentum[name], self.gradients[name])
            parameter.sub_(way, alpha=rate * self.units[name])

    @property
    def finite(self) -> bool:
        """Whether all gradients are."""
        return all(bool(gradient.isfinite().all()) for gradient in self.gradients.values())

    @torch.no_grad()
    def undo_(self) -> None:
        """Take the last step back, once, and forget what led to it."""
        for name, parameter in self.parameters.items():
            parameter.copy_(self.before[name])
            self.momentum[name].zero_()

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All that a later step depends on beside the parameters, under their names."""
        held = {"momentum": self.momentum, "before": self.before}
        return {f"{kind}.{name}": tensor for kind, tensors in held.items() for name, tensor in tensors.items()}


def direction(momentum: Tensor, gradient: Tensor) -> Tensor:
    """Of every tile of the momentum the nearest orthogonal one, scaled to entries of size 1 on average.

    Args:
        momentum: (..., rows, columns). gradient: of its shape; tiles of it that are zero have no direction.
    """
    tiles = _cut(momentum)
    reached = _cut(gradient).ne(0).any(-1, keepdim=True).any(-2, keepdim=True)
    way = orthogonal(tiles) * max(tiles.shape[-2:]) ** 0.5
    return _put_together(way.where(reached, 0), momentum.shape)


def orthogonal(matrices: Tensor) -> Tensor:
    """About the orthogonal matrices nearest to some: U·Vᵀ of each U·S·Vᵀ, by a Newton-Schulz iteration of order five.

    Args:
        matrices: (..., rows, columns); zero stays zero.
    """
    wide = matrices if matrices.shape[-2] <= matrices.shape[-1] else matrices.mT
    tiny = torch.finfo(wide.dtype).tiny
    x = wide / wide.abs().amax((-2, -1), keepdim=True).clamp_min(tiny)  # or the squares in the norm would be zero
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp_min(tiny)
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if wide is matrices else x.mT


def _cut(matrix: Tensor) -> Tensor:
    """(..., rows, columns) into its tiles, (..., tiles down, tiles across, rows of one, columns of one)."""
    *lead, rows, columns = matrix.shape
    high, wide = _side(rows), _side(columns)
    return matrix.reshape(*lead, rows // high, high, columns // wide, wide).transpose(-3, -2)


def _put_together(tiles: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of `_cut`."""
    return tiles.transpose(-3, -2).reshape(shape)


@cache
def _side(size: int) -> int:
    """The largest side of a tile that divides a size."""
    return max(side for side in range(1, min(TILE, size) + 1) if size % side == 0)
