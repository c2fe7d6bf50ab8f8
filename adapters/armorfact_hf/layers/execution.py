"""Which strategy multiplies with a pruned layer's core, by the number of tokens."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from armorfact_hf.layers.strategies import dense, packed, semi_structured, unpacked
from armorfact_hf.layers.strategies.strategy import Kind, Strategy

STRATEGIES: dict[str, Strategy] = {
    "packed": packed,
    "unpacked": unpacked,
    "semi_structured": semi_structured,
    "dense": dense,
}


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
        numbers = [limit for limit in limits[:-1] if isinstance(limit, int) and limit > 0]
        growing = len(numbers) == len(limits) - 1 and numbers == sorted(set(numbers))
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

    @classmethod
    def parse(cls, text: str) -> Execution:
        """The inverse of `text`."""
        return cls.of(json.loads(text))

    @property
    def text(self) -> str:
        """As JSON: what stands in a traced graph, which outlives the layer and the process that it was made of."""
        return json.dumps(self.choices)

    def at(self, tokens: int) -> str:
        """The strategy for so many tokens."""
        for limit, strategy in self.choices[:-1]:
            if limit is not None and tokens <= limit:
                return strategy
        return self.choices[-1][1]

    @property
    def strategies(self) -> frozenset[str]:
        """Every strategy that some number of tokens leads to."""
        return frozenset(strategy for _, strategy in self.choices)


PACKED, UNPACKED = Execution.always("packed"), Execution.always("unpacked")
FEW_PACKED = {count: Execution(((count, "packed"), (None, "unpacked"))) for count in (16, 64)}


def default_execution(kind: Kind) -> Execution:
    """What runs where nothing was measured: no strategy that keeps a second copy of the weights.

    On a CPU in float32 the packed core at any number of tokens; in 16 bits up to 16 tokens, above which the dense
    matrix units of recent CPUs win (docs/benchmarks.md). On a GPU packed up to 64 tokens, where Triton is installed:
    below that a product is bound by memory. That number is not measured yet; `armorfact bench` measures it.
    """
    if packed.refusal(kind) is not None:
        return UNPACKED
    if kind.device.type == "cpu":
        return PACKED if kind.dtype == torch.float32 else FEW_PACKED[16]
    return FEW_PACKED[64] if kind.device.type == "cuda" else UNPACKED


def runnable(kind: Kind) -> list[str]:
    """The strategies that can run such a layer, in the order of the table."""
    return [name for name, strategy in STRATEGIES.items() if strategy.refusal(kind) is None]
