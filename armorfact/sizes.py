"""Which sizes of blocks fit a layer, and which of them "auto" takes."""

from __future__ import annotations

from typing import Any

from armorfact import arrays
from armorfact.pattern import Pattern

MAX_AUTO_BLOCK = 128


def auto_block(
    shape: tuple[int, int], pattern: str | Pattern = "2:4", most_overhead: float | None = None
) -> tuple[int, int] | None:
    """The (block_out, block_in) that "auto" stands for, at most 128; None where no block fits.

    Without a limit, the largest that divides each dimension; with one, square blocks: the largest
    whose wrappers add at most ``most_overhead`` to the entries of W, b / d_in + b / d_out, or the
    smallest there is where all add more.

    Args:
        shape: (d_out, d_in).
        pattern: "N:M"; block_in is a multiple of M, and so is a square block.
        most_overhead: the limit, such as 1/8.

    >>> auto_block((192, 24)), auto_block((192, 24), most_overhead=1 / 8)
    ((96, 24), (4, 4))
    >>> auto_block((4096, 1024), most_overhead=1 / 8)
    (64, 64)
    """
    d_out, d_in = shape
    group = Pattern.parse(pattern).group
    across = fitting(d_in, group)
    if most_overhead is None:
        return (max(fitting(d_out, 1)), max(across)) if across else None
    square = [b for b in across if d_out % b == 0]
    light = [b for b in square if b / d_in + b / d_out <= most_overhead]
    size = max(light, default=min(square, default=None))
    return None if size is None else (size, size)


def fitting(length: int, group: int, most: int = MAX_AUTO_BLOCK) -> list[int]:
    """The multiples of ``group`` up to ``most`` that divide ``length``."""
    return [size for size in range(group, most + 1, group) if length % size == 0]


def blocks(block: Any, shape: tuple[int, int], pattern: Pattern) -> tuple[int, int]:
    """(block_out, block_in) that fit a (d_out, d_in) weight whose d_in is a multiple of the group.

    Args:
        block: an int, a pair, or "auto", see `auto_block`.

    Raises:
        TypeError: none of these.
        ValueError: a size that does not fit; the message lists those that would.
    """
    if isinstance(block, str):
        if block != "auto":
            raise ValueError(f"block must be an int, a pair of ints or 'auto', got {block!r}")
        return max(fitting(shape[0], 1)), max(fitting(shape[1], pattern.group))
    pair = _pair(block)
    for size, length, group, name in zip(pair, shape, (1, pattern.group), ("d_out", "d_in"), strict=True):
        if size < 1 or length % size or size % group:
            rule = f" and is a multiple of the pattern's group {group}" if group > 1 else ""
            raise ValueError(
                f"block {size} does not fit {name} = {length}: it needs a size that divides "
                f"{length}{rule}; these fit: {fitting(length, group, length)}, or block='auto'"
            )
    return pair


def _pair(block: Any) -> tuple[int, int]:
    pair = block if isinstance(block, tuple | list) else (block, block)
    try:
        block_out, block_in = (arrays.integer(size, "block") for size in pair)
    except (TypeError, ValueError):
        raise TypeError(f"block must be an int, a pair of ints or 'auto', got {block!r}") from None
    return block_out, block_in
