"""Keeps the product A C B as an ordinary weight beside the factors."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from armorfact_hf.layers.strategies.strategy import Kind, Operands


def refusal(kind: Kind) -> str | None:
    """Nothing is refused."""
    return None


def prepare(operands: Operands) -> dict[str, Tensor]:
    """The merged weight."""
    return {"merged": operands.dense()}


def product(x: Tensor, operands: Operands) -> Tensor:
    """y = (A C B) x."""
    return functional.linear(x, operands.kept("merged"))
