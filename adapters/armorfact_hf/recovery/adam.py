"""Adam whose last step can be taken back, and whose whole state is a few named tensors and two numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

BETAS = (0.9, 0.95)
EPSILON = 1e-8


class Adam:
    """Kingma and Ba's method (arXiv 1412.6980) over named parameters.

    A step moves each parameter by a multiple of m / (√v + ε), its moments; so the last one is taken back, up to
    rounding, from the moments as they are, and nothing else need be kept for that.

    Args:
        parameters: float32 or float64; each holds its gradient, zero at first, from here on.
        units: what the rate of a step is multiplied with for each.

    Attributes:
        gradients: those that the parameters hold.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], units: Mapping[str, float]) -> None:
        self.parameters, self.units = dict(parameters), units
        self.mean = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
        self.square = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
        self.count, self.last_rate = 0, 0.0
        self.gradients = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
        for name, parameter in self.parameters.items():
            parameter.grad = self.gradients[name]

    def zero_gradients_(self) -> None:
        """Forget the gradients."""
        for gradient in self.gradients.values():
            gradient.zero_()

    @torch.no_grad()
    def step_(self, rate: float) -> None:
        """Move along the gradients."""
        self.count, self.last_rate = self.count + 1, rate
        for name, gradient in self.gradients.items():
            self.mean[name].lerp_(gradient, 1 - BETAS[0])
            self.square[name].mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
        self._move_(-rate)

    @torch.no_grad()
    def undo_(self) -> None:
        """Take the last step back, once."""
        if self.last_rate:
            self._move_(self.last_rate)
        self.last_rate = 0.0

    def _move_(self, amount: float) -> None:
        unbiased = [1 - beta**self.count for beta in BETAS]
        for name, parameter in self.parameters.items():
            scale = self.square[name].sqrt().div_(math.sqrt(unbiased[1])).add_(EPSILON)
            parameter.addcdiv_(self.mean[name], scale, value=amount * self.units[name] / unbiased[0])

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The moments, under the names of the parameters."""
        moments = {"mean": self.mean, "square": self.square}
        return {f"{moment}.{name}": tensor for moment, held in moments.items() for name, tensor in held.items()}
