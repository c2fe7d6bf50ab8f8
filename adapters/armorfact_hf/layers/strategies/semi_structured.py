"""The sparse tensor cores of an NVIDIA GPU, on a second copy of the core in cuSPARSELt's form: for many tokens."""

from __future__ import annotations

from torch import Tensor

from armorfact_hf.layers.kernels import cusparselt
from armorfact_hf.layers.kernels.cusparselt import refusal as refusal
from armorfact_hf.layers.strategies.strategy import Operands


def prepare(operands: Operands) -> dict[str, Tensor]:
    """The compressed core; the algorithm is searched now, since a product may run where nothing can be measured."""
    compressed = cusparselt.compress(operands.core)
    cusparselt.found_algorithm(compressed)
    return {"compressed": compressed.tensor}


def product(x: Tensor, operands: Operands) -> Tensor:
    """y = A (C (B x))."""
    compressed = cusparselt.Compressed(operands.kept("compressed"), (operands.values.shape[0], operands.columns))
    algorithm = cusparselt.found_algorithm(compressed)
    return operands.widened.between_wrappers(x, lambda inputs: cusparselt.product(compressed, inputs, algorithm))
