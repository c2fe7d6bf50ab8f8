"""The Gram matrix of the inputs and the one of the outputs."""

from __future__ import annotations

import math
from typing import Any

from armorfact import arrays
from armorfact.definite import FINE, rounding_of, unit_scale
from armorfact.gram import DiagonalGram, FullGram, Gram
from armorfact.validate.weights import finite, floating, same_home, working_dtype

Array = Any


def gram(value: Any, weight: Array) -> tuple[Gram, int]:
    """XXt in the working dtype of W: None, the diagonal, or the full matrix.

    Args:
        value: None (identity), (d_in,) or (d_in, d_in).
        weight: W, already checked.

    Returns:
        H in units of 2**exponent, and the exponent: even, and such that the largest entry is in
        [1/4, 1). Scaled before it is rounded, nothing that matters leaves the range of float32.

    Raises:
        TypeError: not an array, not real floating, or of another library than W.
        ValueError: wrong shape, another device, NaN or infinite entries, negative diagonal, not
            symmetric, or a channel without energy that is correlated with another one.
    """
    xp = arrays.namespace(weight)
    d_in, dtype = weight.shape[1], working_dtype(weight)
    if value is None:
        return DiagonalGram(xp.ones(d_in, dtype=dtype, device=arrays.device(weight))), 0
    array = floating(value, "XXt")
    same_home(array, weight, "XXt")
    if array.shape not in ((d_in,), (d_in, d_in)):
        raise ValueError(
            f"XXt must have shape ({d_in}, {d_in}), its diagonal ({d_in},), or be None, "
            f"got {array.shape} for W of shape {weight.shape}"
        )
    finite(array, "XXt")
    diagonal = array if array.ndim == 1 else xp.linalg.diagonal(array)
    if bool(xp.any(diagonal < 0)):
        raise ValueError(
            "XXt has a negative entry on its diagonal; it must be X @ X.T, whose diagonal is the "
            "energy of each input channel"
        )
    converted, exponent = _scaled_square(array, dtype)
    if converted.ndim == 1:
        return DiagonalGram(converted), exponent
    of_an_entry = 10 * max(arrays.epsilon(array), arrays.epsilon(converted))
    _symmetric(converted, min(rounding_of(array, converted), max(of_an_entry, FINE)))
    least = max(math.ldexp(arrays.smallest(array), -exponent), arrays.smallest(converted))
    return FullGram(_without_lost_channels(converted, least)), exponent


def as_given(value: Any, gram: Gram) -> Gram:
    """XXt, already checked, in its own dtype and units: what losses are reported in."""
    return gram if value is None else type(gram)(arrays.detached(value))


def _symmetric(matrix: Array, tolerance: float) -> None:
    scale = unit_scale(matrix)
    for part in arrays.panels(matrix.shape[0]):
        rows = matrix[part, :] * scale[part][:, None] * scale[None, :]
        columns = matrix[:, part] * scale[:, None] * scale[part][None, :]
        if arrays.largest(rows - arrays.transpose(columns)) > tolerance:
            raise ValueError("XXt is not symmetric; compute it as X @ X.T, or pass (XXt + XXt.T) / 2")


def _without_lost_channels(matrix: Array, least: float) -> Array:
    """H without what is left of channels whose energy rounding has made zero.

    Args:
        least: the smallest energy that would not have been. What such a channel may have in common with another one is
            bounded by it, since H_ij^2 <= H_ii H_jj.
    """
    xp = arrays.namespace(matrix)
    diagonal = xp.linalg.diagonal(matrix)
    lost = diagonal == 0
    if not bool(xp.any(lost)):
        return matrix
    size = xp.where(lost, xp.full_like(diagonal, least), diagonal) ** 0.5
    for part in arrays.panels(matrix.shape[0]):
        beyond = xp.abs(matrix[part, :]) > size[part][:, None] * size[None, :]
        if bool(xp.any(beyond & (lost[part][:, None] | lost[None, :]))):
            raise ValueError(
                "XXt is not positive semidefinite: a channel with zero energy on the diagonal is "
                "correlated with another one"
            )
    return xp.where(lost[:, None] | lost[None, :], xp.zeros_like(matrix), matrix)


def output_gram(value: Any, row_weight: Any, weight: Array, block_out: int) -> tuple[Array | None, int]:
    """G, the importance of the outputs, in float64: (d_out,), or (d_out / block_out, block_out, block_out).

    Args:
        value: G, or None.
        row_weight: the vector under its other name, or None.

    Returns:
        G in units of 2**exponent, and the exponent, which is even.

    Raises:
        TypeError: not an array of W's library with a real floating dtype.
        ValueError: both given, wrong shape, entries that are not finite, a vector that is not
            positive, blocks that are not symmetric positive definite.
    """
    if value is not None and row_weight is not None:
        raise ValueError("row_weight is the diagonal case of output_gram: give one of them")
    if value is None and row_weight is None:
        return None, 0
    name, value = ("output_gram", value) if row_weight is None else ("row_weight", row_weight)
    array = floating(value, name)
    same_home(array, weight, name)
    d_out = weight.shape[0]
    allowed: dict[tuple[int, ...], str] = {(d_out,): "one entry a row of W"}
    if name == "output_gram":
        allowed[(d_out // block_out, block_out, block_out)] = "one matrix for each block of A"
    if tuple(array.shape) not in allowed:
        shapes = " or ".join(f"{shape}, {what}" for shape, what in allowed.items())
        raise ValueError(f"{name} must have shape {shapes}, got {tuple(array.shape)}")
    finite(array, name)
    xp = arrays.namespace(array)
    if array.ndim == 1 and bool(xp.any(array <= 0)):
        raise ValueError(f"{name} must be positive; give a row that hardly matters a small weight")
    scaled, exponent = _scaled_square(array, xp.float64)
    if array.ndim == 3:
        _definite_blocks(scaled, 10 * arrays.epsilon(array) * block_out)
    return scaled, exponent


def _definite_blocks(matrices: Array, tolerance: float) -> None:
    xp = arrays.namespace(matrices)
    diagonal = xp.linalg.diagonal(matrices)
    if bool(xp.all(diagonal > 0)):
        scale = diagonal**-0.5
        asymmetry = (matrices - arrays.transpose(matrices)) * scale[..., :, None] * scale[..., None, :]
        if arrays.largest(asymmetry) > tolerance:
            raise ValueError("output_gram is not symmetric; pass (G + G.T) / 2 of each block")
        if arrays.cholesky(matrices) is not None:
            return
    raise ValueError(
        "output_gram is not positive definite: every block must be; add a small multiple of its own diagonal to it"
    )


def _scaled_square(array: Array, dtype: Any) -> tuple[Array, int]:
    """The array in ``dtype`` in units of an even power of two, scaled before it is rounded, and the exponent."""
    xp = arrays.namespace(array)
    wide = array if array.dtype == xp.float64 else xp.astype(array, dtype, copy=False)
    exponent = arrays.exponent(wide if array.ndim == 1 else xp.linalg.diagonal(wide))
    exponent += exponent % 2
    return xp.astype(arrays.times_two_to(wide, -exponent), dtype, copy=False), exponent
