"""Imports the Triton kernels when one is to be launched: Triton need not be installed."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from torch import Tensor


def kernels_for(x: Tensor) -> ModuleType:
    """`triton_kernels`, for the device of x.

    Raises:
        ValueError: x is on the CPU, where only Triton's interpreter runs them.
        ImportError: triton is not installed.
    """
    found = _kernels()
    if x.device.type == "cpu" and not found.INTERPRETED:
        raise ValueError(
            "expected tensors on a GPU, got x on the CPU; `armorfact_hf.layers.strategies.packed` runs on both"
        )
    return found


def _kernels() -> ModuleType:
    try:
        return import_module("armorfact_hf.layers.kernels.triton_kernels")
    except ImportError as error:
        raise ImportError(
            "the packed product on a GPU is written in Triton: pip install triton, or run the layer unpacked: "
            'layer.use_(Execution.always("unpacked"))'
        ) from error
