"""What every way to multiply with a pruned layer provides; each is a module of this folder.

The strategies compute y = A C B x. They differ in what they read of the core C, in what they keep beside the factors,
and in where they run; `armorfact_hf.layers.execution.STRATEGIES` is the table of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from armorfact import Core, Factors, Pattern
from armorfact_hf.layers.kernels.blocks import block_product

PAIR = Pattern(2, 4)


class Kind(NamedTuple):
    """What decides whether a strategy can run a layer.

    Args:
        shape: (d_out, d_in). pattern: N:M, of the core. dtype: of inputs and wrappers. device: where they are.
        core_dtype: of the kept values, where that is another; None is ``dtype``.
    """

    shape: tuple[int, int]
    pattern: Pattern
    dtype: torch.dtype
    device: torch.device
    core_dtype: torch.dtype | None = None

    @property
    def stored(self) -> torch.dtype:
        """Of the kept values."""
        return self.core_dtype or self.dtype


class Operands(NamedTuple):
    """A layer as a strategy gets it: its factors as they are stored, and what `Strategy.prepare` made beside them.

    Args:
        values, positions: the core C, see `armorfact.Core`. pattern: N:M, that of C. columns: d_in.
        left, right: the blocks of A and B, both or neither; both where the values are int8.
        left_scales, right_scales: (2, d_out) and (2, d_in), where the blocks are int8: what their rows, and then what
            their columns are to be multiplied with.
        merged: A C B (d_out, d_in), where "dense" was prepared.
        compressed: C in cuSPARSELt's form, where "semi_structured" was.
    """

    values: Tensor
    positions: Tensor
    left: Tensor | None
    right: Tensor | None
    pattern: Pattern
    columns: int
    merged: Tensor | None = None
    compressed: Tensor | None = None
    left_scales: Tensor | None = None
    right_scales: Tensor | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Of inputs and of all that is floating."""
        wrapper = self.left if self.left_scales is None else self.left_scales
        return (self.values if wrapper is None else wrapper).dtype

    @property
    def widened(self) -> Operands:
        """The same with A and B in the dtype of the inputs."""
        if self.left is None or self.right is None or self.left_scales is None or self.right_scales is None:
            return self
        left, right = _widened(self.left, self.left_scales), _widened(self.right, self.right_scales)
        return self._replace(left=left, right=right, left_scales=None, right_scales=None)

    @property
    def core(self) -> Core:
        """C as it is stored."""
        return Core(self.values, self.positions, self.pattern, self.columns)

    def kept(self, name: str) -> Tensor:
        """What `Strategy.prepare` made beside the factors.

        Raises:
            ValueError: it did not.
        """
        found: Tensor | None = getattr(self, name)
        if found is None:
            raise ValueError(f"the layer keeps no {name} weight: choose the strategy by `use_`, which prepares it")
        return found

    def dense(self) -> Tensor:
        """A C B, (d_out, d_in)."""
        core, (_, _, left, right, *_) = self.core.dense(self.dtype), self.widened
        return core if left is None or right is None else Factors(left, core, right).dense()

    def between_wrappers(self, x: Tensor, core_product: Callable[[Tensor], Tensor]) -> Tensor:
        """A core_product(B x), for the rows of x."""
        y = core_product(x if self.right is None else block_product(self.right, x))
        return y if self.left is None else block_product(self.left, y)


def _widened(blocks: Tensor, scales: Tensor) -> Tensor:
    """Blocks of whole numbers times their scales, rounded once."""
    rows, columns = scales.to(torch.promote_types(scales.dtype, torch.float32)).view(2, *blocks.shape[:2])
    return (blocks * rows[..., :, None] * columns[..., None, :]).to(scales.dtype)


class Strategy(Protocol):
    """One way to compute y = A C B x."""

    def refusal(self, kind: Kind) -> str | None:
        """Why such a layer cannot run in this way, and the way out; None if it can."""

    def prepare(self, operands: Operands) -> dict[str, Tensor]:
        """What has to be kept beside the factors, by its name in `Operands`. Called where nothing is refused."""

    def product(self, x: Tensor, operands: Operands) -> Tensor:
        """y (tokens, d_out), row after row in memory, for x (tokens, d_in) of the layer's dtype and device."""
