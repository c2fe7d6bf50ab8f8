"""A factorization that is given."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from armorfact import arrays
from armorfact.packed import Core
from armorfact.result import BlockDiagonal, Result
from armorfact.validate.weights import finite, floating, same_home

Array = Any


def factorization(value: Any) -> tuple[BlockDiagonal, Core, BlockDiagonal]:
    """A, C and B of a `Result`, or of a triple of them.

    Raises:
        TypeError: neither, or wrappers without a real floating dtype. ValueError: sizes that do not fit each other.
    """
    parts = (value.left, value.core, value.right) if isinstance(value, Result) else value
    kinds = (BlockDiagonal, Core, BlockDiagonal)
    if not isinstance(parts, tuple) or tuple(map(type, parts)) != kinds:
        raise TypeError(
            "a factorization must be a Result or (left, core, right), a BlockDiagonal, a Core and a BlockDiagonal, "
            f"got {type(value).__name__}"
        )
    left, core, right = parts
    core = replace(core, values=arrays.detached(core.values))
    left, right = (BlockDiagonal(floating(side.scaled(), name)) for side, name in ((left, "left"), (right, "right")))
    shape = left.shape[0], right.shape[0]
    if shape != core.shape:
        raise ValueError(f"the wrappers are for a core of shape {shape}, got one of {core.shape}")
    return left, core, right


def fits(parts: tuple[BlockDiagonal, Core, BlockDiagonal], weight: Array) -> None:
    """That a factorization is one of a weight like W.

    Raises:
        TypeError: of another library. ValueError: another shape or device, or entries that are not finite.
    """
    left, core, right = parts
    if core.shape != tuple(weight.shape):
        raise ValueError(f"the factorization has shape {core.shape}, W has {tuple(weight.shape)}")
    for array, name in ((left.blocks, "left"), (core.values, "core"), (right.blocks, "right")):
        same_home(array, weight, f"the factorization's {name}")
        finite(array, f"the factorization's {name}")
    if left.blocks.dtype != right.blocks.dtype:
        raise TypeError(f"the wrappers must have one dtype, got {left.blocks.dtype} and {right.blocks.dtype}")


def integer_core(core: Core) -> None:
    """That a core holds whole numbers.

    Raises:
        TypeError: it does not.
    """
    if str(core.values.dtype).rpartition(".")[2] != "int8":
        raise TypeError(f"the core must be in int8, got {core.values.dtype}: `quantize_core` rounds it")
