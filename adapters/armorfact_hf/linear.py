"""`FactorizedLinear`: a linear layer whose weight is stored as A C B."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from armorfact import BlockDiagonal, Core, Factors, Pattern


class FactorizedLinear(nn.Module):
    """y = x (A C B)' + bias, applied as three thin products.

    Every tensor is named as it is saved: ``values`` and ``positions`` hold the core C (`armorfact.Core`), ``left`` and
    ``right`` the blocks of A and B; a layer pruned in one shot has neither of those two.

    Args:
        d_out, d_in: shape of the weight that this layer stands for.
        pattern: the N:M pattern of C.
        block: sizes (block_out, block_in) of the blocks of A and B, or None for C alone.
        bias: whether there is one.
        dtype, device: of the floating tensors.
    """

    def __init__(
        self,
        d_out: int,
        d_in: int,
        pattern: str | Pattern = "2:4",
        block: tuple[int, int] | None = None,
        bias: bool = False,
        dtype: torch.dtype | None = None,
        device: Any = None,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = d_out, d_in
        self.pattern = Pattern.parse(pattern)
        self.block = None if block is None else (int(block[0]), int(block[1]))
        kept = d_in // self.pattern.group * self.pattern.keep
        bytes_a_row = -(-kept * self.pattern.index_bits // 8)

        def empty(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(shape, dtype=dtype, device=device), requires_grad=False)

        self.values = empty(d_out, kept)
        self.register_buffer("positions", torch.zeros(d_out, bytes_a_row, dtype=torch.uint8, device=device))
        self.left = self.right = None
        if self.block is not None:
            (block_out, block_in) = self.block
            self.left = empty(d_out // block_out, block_out, block_out)
            self.right = empty(d_in // block_in, block_in, block_in)
        self.bias = empty(d_out) if bias else None
        self._unpacked: tuple[Any, Tensor] | None = None

    @classmethod
    def of(
        cls,
        core: Core,
        left: BlockDiagonal | None = None,
        right: BlockDiagonal | None = None,
        bias: Tensor | None = None,
    ) -> FactorizedLinear:
        """The layer that holds these factors; they are copied.

        Args:
            core: C. left, right: A and B, both or neither. bias: (d_out,) or None.
        """
        block = None if left is None or right is None else (left.blocks.shape[-1], right.blocks.shape[-1])
        values = core.values
        layer = cls(*core.shape, core.pattern, block, bias is not None, values.dtype, values.device)
        given = {"values": values, "positions": core.packed, "bias": bias}
        if block is not None:
            given |= {"left": left.blocks, "right": right.blocks}
        with torch.no_grad():
            for name, tensor in given.items():
                if tensor is not None:
                    getattr(layer, name).copy_(tensor)
        return layer

    @property
    def core(self) -> Core:
        """C as it is stored."""
        return Core(self.values.detach(), self.positions, self.pattern, self.in_features)

    @property
    def weight(self) -> Tensor:
        """A C B, (d_out, d_in); formed at every call."""
        core = self.core.dense()
        return core if self.block is None else Factors(self.left.detach(), core, self.right.detach()).dense()

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors that are saved."""
        return sum(tensor.nbytes for tensor in self.state_dict().values())

    def forward(self, x: Tensor) -> Tensor:
        """y (..., d_out) for x (..., d_in)."""
        if self.block is None:
            return functional.linear(x, self._dense_core(), self.bias)
        y = functional.linear(BlockDiagonal(self.right).apply(x), self._dense_core())
        y = BlockDiagonal(self.left).apply(y)
        return y if self.bias is None else y + self.bias

    def _dense_core(self) -> Tensor:
        """C with its zeros, unpacked again only when the stored tensors have changed."""
        state = (self.values.data_ptr(), self.values._version, self.positions.data_ptr(), self.positions._version)
        if self._unpacked is None or self._unpacked[0] != state:
            self._unpacked = (state, self.core.dense())
        return self._unpacked[1]

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"pattern={self.pattern}, block={self.block}"
        )
