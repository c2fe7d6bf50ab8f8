"""Everything the user passes in is checked here, before any work is done."""

from __future__ import annotations

from typing import Any

from armorfact import arrays
from armorfact.gram import DiagonalGram, FullGram, Gram
from armorfact.pattern import Pattern

Array = Any

MAX_AUTO_BLOCK = 128


def weight(value: Any, pattern: Pattern) -> Array:
    """W as given, once it is a finite real matrix that the pattern's groups divide.

    Raises:
        TypeError: not an array, or not of a real floating dtype.
        ValueError: not a matrix, empty, not divided by the group, NaN or infinite entries.
    """
    array = _floating(value, "W")
    if array.ndim != 2 or 0 in array.shape:
        raise ValueError(f"W must be a non-empty matrix (d_out, d_in), got shape {array.shape}")
    if array.shape[1] % pattern.group:
        raise ValueError(
            f"pattern {pattern} needs d_in to be a multiple of {pattern.group}, but W has "
            f"d_in = {array.shape[1]}; pad the columns or leave this layer dense"
        )
    _finite(array, "W")
    return array


def _floating(value: Any, name: str) -> Array:
    if not arrays.is_array(value):
        raise TypeError(
            f"{name} must be a NumPy, Torch or CuPy array, got {type(value).__name__}; numpy.asarray makes one"
        )
    xp = arrays.namespace(value)
    if not xp.isdtype(value.dtype, "real floating"):
        raise TypeError(f"{name} must have a real floating dtype, got {value.dtype}; convert it to float32")
    return arrays.detached(value)


def _finite(array: Array, name: str) -> None:
    xp = arrays.namespace(array)
    finite = xp.isfinite(array)
    if not bool(xp.all(finite)):
        bad = int(xp.count_nonzero(~finite))
        raise ValueError(f"{name} has {bad} NaN or infinite entries; the loss is not defined")


def seed(value: Any) -> int:
    """The seed of the solvers that draw at random.

    Raises:
        TypeError: not an integer. ValueError: a negative one.
    """
    found = arrays.integer(value, "seed")
    if found < 0:
        raise ValueError(f"seed must not be negative, got {found}")
    return found


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
    array = _floating(value, "XXt")
    _same_home(array, weight)
    if array.shape not in ((d_in,), (d_in, d_in)):
        raise ValueError(
            f"XXt must have shape ({d_in}, {d_in}), its diagonal ({d_in},), or be None, "
            f"got {array.shape} for W of shape {weight.shape}"
        )
    _finite(array, "XXt")
    diagonal = array if array.ndim == 1 else xp.linalg.diagonal(array)
    if bool(xp.any(diagonal < 0)):
        raise ValueError(
            "XXt has a negative entry on its diagonal; it must be X @ X.T, whose diagonal is the "
            "energy of each input channel"
        )
    converted, exponent = _scaled_square(array, dtype)
    if converted.ndim == 1:
        return DiagonalGram(converted), exponent
    _symmetric(converted, rounding_of(array, converted))
    return FullGram(converted), exponent


def as_given(value: Any, gram: Gram) -> Gram:
    """XXt, already checked, in its own dtype and units: what losses are reported in."""
    return gram if value is None else type(gram)(arrays.detached(value))


def _same_home(array: Array, weight: Array) -> None:
    if arrays.library(array) != arrays.library(weight):
        raise TypeError(
            f"W is a {arrays.library(weight)} array and XXt a {arrays.library(array)} one; "
            "convert one of them so that both come from the same library"
        )
    if arrays.device(array) != arrays.device(weight):
        raise ValueError(f"W is on {arrays.device(weight)} and XXt on {arrays.device(array)}; move one of them")


def rounding_of(given: Array, converted: Array) -> float:
    """How far rounding may have moved an eigenvalue of H, scaled to unit diagonal."""
    return 10 * max(arrays.epsilon(given), arrays.epsilon(converted)) * converted.shape[0]


def _symmetric(matrix: Array, tolerance: float) -> None:
    xp = arrays.namespace(matrix)
    scaled, alive = _unit_diagonal(matrix)
    if arrays.largest(scaled - arrays.transpose(scaled)) > tolerance:
        raise ValueError("XXt is not symmetric; compute it as X @ X.T, or pass (XXt + XXt.T) / 2")
    if bool(xp.any((matrix != 0) & ~(alive[:, None] & alive[None, :]))):
        raise ValueError(
            "XXt is not positive semidefinite: a channel with zero energy on the diagonal is "
            "correlated with another one"
        )


def _unit_diagonal(matrix: Array) -> tuple[Array, Array]:
    """H scaled to unit diagonal, so that channels of small energy count as much as outliers; which have any."""
    xp = arrays.namespace(matrix)
    diagonal = xp.linalg.diagonal(matrix)
    alive = diagonal > 0
    scale = xp.where(alive, xp.where(alive, diagonal, xp.ones_like(diagonal)) ** -0.5, xp.zeros_like(diagonal))
    return matrix * scale[:, None] * scale[None, :], alive


def definite(gram: Gram, given: Array | None) -> Gram:
    """H as a solver may minimize over it: with no eigenvalue that rounding could have made negative.

    Where H, scaled to unit diagonal, is definite beyond what float32 (or float64) resolves, it is
    returned as it is; else with a floor, a few roundings of each diagonal entry, added to it. An
    H of few tokens has zero eigenvalues; rounded, some are negative, and minimizing finds them.

    Args:
        gram: H in the working dtype. given: XXt, whose dtype says how negative rounding may be.

    Raises:
        ValueError: not positive semidefinite.
    """
    if isinstance(gram, DiagonalGram):
        return gram
    xp = arrays.namespace(gram.matrix)
    tolerance = rounding_of(given, gram.matrix)
    scaled, alive = _unit_diagonal(gram.matrix)
    eye = xp.eye(scaled.shape[0], dtype=scaled.dtype, device=arrays.device(scaled))
    scaled += xp.where(alive, 0 * xp.ones_like(gram.diagonal), xp.ones_like(gram.diagonal)) * eye
    margin = 4 * arrays.epsilon(scaled) * scaled.shape[0] ** 0.5
    floor = 0.0
    while arrays.cholesky(scaled + (floor - margin) * eye) is None:
        if floor > tolerance:
            _refuse_indefinite(scaled, tolerance)
            break
        floor = 2 * floor or 2 * margin
    return gram.floored(floor) if floor else gram


def _refuse_indefinite(scaled: Array, tolerance: float) -> None:
    smallest = float(arrays.namespace(scaled).min(arrays.namespace(scaled).linalg.eigvalsh(arrays.float64(scaled))))
    if smallest < -tolerance:
        raise ValueError(
            f"XXt is not positive semidefinite: scaled to unit diagonal, its smallest eigenvalue "
            f"is {smallest:.3g}; it must be X @ X.T of real inputs"
        )


def blocks(block: Any, shape: tuple[int, int], pattern: Pattern) -> tuple[int, int]:
    """(block_out, block_in) that fit a (d_out, d_in) weight.

    Args:
        block: an int, a pair, or "auto": the largest size up to 128 that divides each dimension,
            and for columns is a multiple of the pattern's group.

    Raises:
        TypeError: none of these.
        ValueError: a size that does not fit; the message lists those that would.
    """
    groups = (1, pattern.group)
    if isinstance(block, str):
        if block != "auto":
            raise ValueError(f"block must be an int, a pair of ints or 'auto', got {block!r}")
        return tuple(max(_fitting(d, g)) for d, g in zip(shape, groups, strict=True))  # type: ignore[return-value]
    pair = block if isinstance(block, tuple | list) else (block, block)
    try:
        pair = tuple(arrays.integer(size, "block") for size in pair)
        if len(pair) != 2:
            raise TypeError
    except TypeError:
        raise TypeError(f"block must be an int, a pair of ints or 'auto', got {block!r}") from None
    for size, length, group, name in zip(pair, shape, groups, ("d_out", "d_in"), strict=True):
        if size < 1 or length % size or size % group:
            rule = f" and is a multiple of the pattern's group {group}" if group > 1 else ""
            raise ValueError(
                f"block {size} does not fit {name} = {length}: it needs a size that divides "
                f"{length}{rule}; these fit: {_fitting(length, group, length)}, or block='auto'"
            )
    return pair


def _fitting(length: int, group: int, most: int = MAX_AUTO_BLOCK) -> list[int]:
    return [size for size in range(group, most + 1, group) if length % size == 0]


def row_weights(value: Any, weight: Array) -> tuple[Array | None, int]:
    """The importance of each output row, (d_out,), in the working dtype.

    Returns:
        The weights in units of 2**exponent, and the exponent, which is even.

    Raises:
        TypeError: not an array of W's library with a real floating dtype.
        ValueError: wrong shape, or entries that are not finite and positive.
    """
    if value is None:
        return None, 0
    array = _floating(value, "row_weight")
    _same_home(array, weight)
    if array.shape != (weight.shape[0],):
        raise ValueError(f"row_weight must have shape ({weight.shape[0]},), one entry a row of W, got {array.shape}")
    _finite(array, "row_weight")
    xp = arrays.namespace(array)
    if bool(xp.any(array <= 0)):
        raise ValueError("row_weight must be positive; give a row that hardly matters a small weight")
    return _scaled_square(array, working_dtype(weight))


def _scaled_square(array: Array, dtype: Any) -> tuple[Array, int]:
    """The array in ``dtype`` in units of an even power of two, scaled before it is rounded, and the exponent."""
    xp = arrays.namespace(array)
    wide = array if array.dtype == xp.float64 else xp.astype(array, dtype, copy=False)
    exponent = arrays.exponent(wide if array.ndim == 1 else xp.linalg.diagonal(wide))
    exponent += exponent % 2
    return xp.astype(arrays.times_two_to(wide, -exponent), dtype, copy=False), exponent
