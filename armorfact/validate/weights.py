"""The weight, and what every array is asked."""

from __future__ import annotations

from typing import Any

from armorfact import arrays
from armorfact.pattern import Pattern

Array = Any


def weight(value: Any, pattern: Pattern) -> Array:
    """W as given, once it is a finite real matrix that the pattern's groups divide.

    Raises:
        TypeError: not an array, not of a real floating dtype of 16 to 64 bits, or of no dense numbers.
        ValueError: not a matrix, empty, not divided by the group, NaN or infinite entries.
    """
    array = floating(value, "W")
    if not arrays.is_dense(array):
        raise TypeError("W must hold its numbers densely, in memory; to_dense() and to() make that of it")
    if array.ndim != 2 or 0 in array.shape:
        raise ValueError(f"W must be a non-empty matrix (d_out, d_in), got shape {array.shape}")
    if array.shape[1] % pattern.group:
        raise ValueError(
            f"pattern {pattern} needs d_in to be a multiple of {pattern.group}, but W has "
            f"d_in = {array.shape[1]}; pad the columns or leave this layer dense"
        )
    finite(array, "W")
    return array


def floating(value: Any, name: str) -> Array:
    if not arrays.is_array(value):
        raise TypeError(
            f"{name} must be a NumPy, Torch or CuPy array, got {type(value).__name__}; numpy.asarray makes one"
        )
    xp = arrays.namespace(value)
    if not xp.isdtype(value.dtype, "real floating"):
        raise TypeError(f"{name} must have a real floating dtype, got {value.dtype}; convert it to float32")
    if xp.finfo(value.dtype).bits > 64:
        raise TypeError(f"{name} must have 64 bits or fewer a number, got {value.dtype}; convert it to float64")
    if xp.finfo(value.dtype).bits < 16:
        raise TypeError(f"{name} must have 16 bits or more a number, got {value.dtype}; convert it to bfloat16")
    return arrays.native(arrays.detached(value))


def finite(array: Array, name: str) -> None:
    xp = arrays.namespace(array)
    if not arrays.all_finite(array):
        bad = int(xp.count_nonzero(~xp.isfinite(array)))
        raise ValueError(f"{name} has {bad} NaN or infinite entries; the loss is not defined")


def same_home(array: Array, weight: Array, name: str) -> None:
    """That an argument comes from the library of W and lies on its device.

    Raises:
        TypeError: another library. ValueError: another device.
    """
    if arrays.library(array) != arrays.library(weight):
        raise TypeError(
            f"W is a {arrays.library(weight)} array and {name} a {arrays.library(array)} one; "
            "convert one of them so that both come from the same library"
        )
    if arrays.device(array) != arrays.device(weight):
        raise ValueError(f"W is on {arrays.device(weight)} and {name} on {arrays.device(array)}; move one of them")


def working_dtype(weight: Array) -> Any:
    """float64 for a float64 weight, float32 for every other."""
    xp = arrays.namespace(weight)
    return xp.float64 if weight.dtype == xp.float64 else xp.float32


def working(weight: Array) -> Array:
    """W in its working dtype; shared with the user's array where that needs no conversion."""
    return arrays.namespace(weight).astype(weight, working_dtype(weight), copy=False)


def scaled(weight: Array) -> tuple[Array, int]:
    """W in its working dtype, in units of a power of two that its largest entry comes near."""
    exponent = arrays.exponent(weight)
    return arrays.times_two_to(working(weight), -exponent), exponent
