"""Which strategy multiplies with a pruned layer's core, by the number of tokens."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec

import numba
import torch
from llvmlite import binding

from armorfact import Pattern

STRATEGIES = ("packed", "unpacked", "semi_structured", "dense")
PACKED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
PAIR = Pattern(2, 4)
HAS_TRITON = find_spec("triton") is not None


@dataclass(frozen=True)
class Execution:
    """What a layer does with so many tokens.

    The strategies, for y = A C B x:

    - "packed" reads the kept values and their positions straight from memory (2:4);
    - "unpacked" writes the core with its zeros for the time of one product, and multiplies with that;
    - "semi_structured" keeps a second copy of the core for the sparse tensor cores of a GPU (2:4);
    - "dense" keeps the product A C B as an ordinary weight beside the factors.

    Args:
        choices: (most tokens, strategy) with growing numbers of tokens; the last is None, without a limit.

    Raises:
        ValueError: an unknown strategy, or limits that do not grow up to a last None.
    """

    choices: tuple[tuple[int | None, str], ...]

    def __post_init__(self) -> None:
        limits = [limit for limit, _ in self.choices]
        numbers = limits[:-1]
        growing = all(isinstance(n, int) and n > 0 for n in numbers) and numbers == sorted(set(numbers))
        if not limits or limits[-1] is not None or not growing:
            raise ValueError(
                f"expected (most tokens, strategy) pairs with growing numbers and None as the last, got {self.choices}"
            )
        for _, strategy in self.choices:
            if strategy not in STRATEGIES:
                raise ValueError(f"a strategy is one of {', '.join(STRATEGIES)}, got {strategy!r}")

    @classmethod
    def always(cls, strategy: str) -> Execution:
        """The same strategy for any number of tokens."""
        return cls(((None, strategy),))

    @classmethod
    def of(cls, choices: Sequence[Sequence]) -> Execution:
        """From nested lists, as JSON holds them."""
        return cls(tuple((limit, strategy) for limit, strategy in choices))

    def at(self, tokens: int) -> str:
        """The strategy for so many tokens."""
        for limit, strategy in self.choices[:-1]:
            if tokens <= limit:
                return strategy
        return self.choices[-1][1]

    @property
    def strategies(self) -> frozenset[str]:
        """Every strategy that some number of tokens leads to."""
        return frozenset(strategy for _, strategy in self.choices)


def packs(device: str, dtype: torch.dtype, pattern: Pattern) -> bool:
    """Whether there is a packed product for such cores on such a device."""
    if pattern != PAIR or dtype not in PACKED_DTYPES:
        return False
    return HAS_TRITON if device == "cuda" else device in ("cpu", "meta") and (dtype != torch.float16 or _cpu_has_half())


@cache
def _cpu_has_half() -> bool:
    """Whether the processor that numba compiles for converts float16: x86 since 2012, and all others."""
    if platform.machine().lower() not in ("x86_64", "amd64", "i386", "i686"):
        return True
    if numba.config.CPU_FEATURES is not None:
        return "+f16c" in numba.config.CPU_FEATURES
    return bool(binding.get_host_cpu_features().get("f16c"))


PACKED, UNPACKED = Execution.always("packed"), Execution.always("unpacked")
FEW_PACKED = {count: Execution(((count, "packed"), (None, "unpacked"))) for count in (16, 64)}


def default_execution(device: str, dtype: torch.dtype, pattern: Pattern) -> Execution:
    """What runs where nothing was measured: no strategy that keeps a second copy of the weights.

    On a CPU in float32 the packed core at any number of tokens; in 16 bits up to 16 tokens, above which the dense
    matrix units of recent CPUs win (docs/benchmarks.md). On a GPU packed up to 64 tokens, where Triton is installed:
    below that a product is bound by memory. That number is not measured yet; `armorfact bench` measures it.
    """
    if not packs(device, dtype, pattern):
        return UNPACKED
    if device == "cpu":
        return PACKED if dtype == torch.float32 else FEW_PACKED[16]
    return FEW_PACKED[64] if device == "cuda" else UNPACKED
