"""N:M sparsity patterns: which positions a group of M consecutive weights may keep."""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from armorfact import arrays

Array = Any

MAX_SUPPORTS = 100


@dataclass(frozen=True)
class Pattern:
    """At most ``keep`` non-zeros in every ``group`` consecutive columns of a row.

    Args:
        keep: N, the number of entries a group keeps.
        group: M, the number of consecutive columns in a group.

    Raises:
        TypeError: not integers.
        ValueError: unless ``1 <= keep < group`` and the group has at most 100 supports
            (the core step weighs every one of them).
    """

    keep: int
    group: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "keep", arrays.integer(self.keep, "N of a pattern"))
        object.__setattr__(self, "group", arrays.integer(self.group, "M of a pattern"))
        if not 1 <= self.keep < self.group:
            raise ValueError(
                f"an N:M pattern needs 1 <= N < M, got {self.keep}:{self.group}; hardware accelerates '2:4'"
            )
        # There are at least M supports, and counting those of a huge M would take minutes.
        if self.group > MAX_SUPPORTS or math.comb(self.group, self.keep) > MAX_SUPPORTS:
            raise ValueError(
                f"pattern {self.keep}:{self.group} has more than the {MAX_SUPPORTS} supports a group that "
                f"the exact core step weighs; "
                "choose one such as '2:4', '4:8' or '2:8'"
            )

    @classmethod
    def parse(cls, text: str | Pattern) -> Pattern:
        """Read ``"N:M"``; a ``Pattern`` passes through.

        Raises:
            ValueError: the text is not of that form, or names an unsupported pattern.
            TypeError: neither text nor a ``Pattern``.
        """
        if isinstance(text, Pattern):
            return text
        if not isinstance(text, str):
            raise TypeError(f"pattern must be a string such as '2:4', got {type(text).__name__}")
        match = re.fullmatch(r"\s*(\d{1,18})\s*:\s*(\d{1,18})\s*", text)
        if match is None:
            raise ValueError(f"pattern must look like '2:4' (N kept of M), got {text!r}")
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"{self.keep}:{self.group}"

    @cached_property
    def supports(self) -> tuple[tuple[int, ...], ...]:
        """Every choice of ``keep`` positions in a group, in lexicographic order."""
        return tuple(itertools.combinations(range(self.group), self.keep))

    @property
    def index_bits(self) -> int:
        """Bits that store one position: 1, 2, 4 or 8, so that no position straddles two bytes."""
        return next(bits for bits in (1, 2, 4, 8) if self.group <= 1 << bits)

    def top_mask(self, score: Array) -> Array:
        """Boolean mask of the ``keep`` largest scores in each group; ties keep the left-most.

        Args:
            score: (rows, columns) real, ``columns`` a multiple of ``group``.
        """
        xp = arrays.namespace(score)
        rows, columns = score.shape
        grouped = xp.reshape(score, (rows, columns // self.group, self.group))
        order = xp.argsort(grouped, axis=-1, descending=True, stable=True)
        rank = xp.argsort(order, axis=-1, stable=True)
        return xp.reshape(rank < self.keep, (rows, columns))

    def most_kept(self, array: Array) -> int:
        """The largest number of non-zeros in any group of ``array`` (rows, columns)."""
        xp = arrays.namespace(array)
        rows, columns = array.shape
        grouped = xp.reshape(array != 0, (rows, columns // self.group, self.group))
        return int(xp.max(xp.count_nonzero(grouped, axis=-1)))
