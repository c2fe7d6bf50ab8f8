"""What learning rates are measured in.

A step of Adam moves every entry of a tensor by about the rate, whatever the gradient, and weights are ten times as
large in one model as in another. So rates are shares of what they move.
"""

from __future__ import annotations

from torch import Tensor


def unit(factor: Tensor) -> float:
    """What a rate of 1 is for a factor: the root mean square of its entries."""
    return float(factor.detach().float().square().mean().sqrt())
