"""Which part of a layer each of several devices computes, when they share its product.

With W = A C B there are two ways to cut:

- by rows (servers call it column-parallel): a rank holds some rows of C and the blocks of A on them, and all of B;
- by columns (row-parallel): a rank holds some columns of C and the blocks of B on them, and all of A. It is linear, so
  the sum over ranks of A C_r B_r x_r is A C B x.

A cut through the middle of a block, of a group or of a byte is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from armorfact_hf.layers.format import LayerFormat

WAY_OUT = (
    "serve with another tensor_parallel_size, or prune the dense model again with `armorfact prune --tensor-parallel "
    "{ranks}` (in Python PruneConfig(tensor_parallel={ranks})), which chooses blocks that fit; where the "
    "checkpoint holds layers fused, they have to divide a rank's part of each of the outputs: choose them by --block"
)


@dataclass(frozen=True)
class Share:
    """What one of several ranks computes of W (d_out, d_in).

    Args:
        whole: (d_out, d_in).
        rows: of W that the rank computes, ranges one after another.
        columns: of W, whose inputs it gets.
        ranks: how many share W, for messages.
    """

    whole: tuple[int, int]
    rows: tuple[range, ...]
    columns: range
    ranks: int = 1

    @classmethod
    def all_of(cls, shape: tuple[int, int]) -> Share:
        """The share of a rank that computes W alone."""
        return cls(shape, (range(shape[0]),), range(shape[1]))

    @classmethod
    def of_rows(cls, shape: tuple[int, int], rank: int, ranks: int) -> Share:
        """The rank's part of the rows."""
        return cls(shape, (part_of(range(shape[0]), rank, ranks),), range(shape[1]), ranks)

    @classmethod
    def of_columns(cls, shape: tuple[int, int], rank: int, ranks: int) -> Share:
        """The rank's part of the columns."""
        return cls(shape, (range(shape[0]),), part_of(range(shape[1]), rank, ranks), ranks)

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns) of the part."""
        return sum(map(len, self.rows)), len(self.columns)

    def of_weight(self, weight: Tensor) -> Tensor:
        """The part of a dense W (d_out, d_in)."""
        return self._rows(weight)[:, self.columns.start : self.columns.stop]

    def of_format(self, layer: LayerFormat) -> LayerFormat:
        """How the part of a pruned layer is stored.

        Raises:
            ValueError: the layer is of another shape, or the cut goes through a block, a group or a byte; names the
                layer, the numbers and the way out.
        """
        if layer.shape != self.whole:
            raise ValueError(
                f"{layer.name}: the model has shape {list(self.whole)} there, config.json says {list(layer.shape)}: "
                "copy or download config.json again"
            )
        if reason := self.refusal(layer):
            raise ValueError(f"{layer.name}: {reason}: {WAY_OUT.format(ranks=self.ranks)}")
        return replace(layer, shape=self.shape)

    def of_factor(self, layer: LayerFormat, part: str, tensor: Tensor) -> Tensor:
        """The part of one of a pruned layer's tensors, where `of_format` refuses nothing.

        Args:
            part: its name, as in `LayerFormat.tensors`. tensor: of the shape that ``layer`` says.
        """
        if part == "left_scales":
            return self._rows(tensor.T).T.contiguous()
        if part == "right_scales":
            return tensor[:, self.columns.start : self.columns.stop]
        if part == "left":
            return self._rows(tensor, tensor.shape[-1])
        length, columns = tensor.shape[0 if part == "right" else 1], self.columns
        first, end = columns.start * length // layer.shape[1], columns.stop * length // layer.shape[1]
        return tensor[first:end] if part == "right" else self._rows(tensor)[:, first:end]

    def refusal(self, layer: LayerFormat) -> str | None:
        """Why no rank can hold this part of a pruned layer."""
        (d_out, d_in), pattern = layer.shape, layer.pattern
        for rows in self.rows:
            if layer.block is not None and not _between(rows, layer.block[0], d_out):
                return f"{self._told(rows, 'rows', d_out)}, which cuts a block of A of {layer.block[0]} rows in two"
        columns, told = self.columns, self._told(self.columns, "columns", d_in)
        if layer.block is not None and not _between(columns, layer.block[1], d_in):
            return f"{told}, which cuts a block of B of {layer.block[1]} columns in two"
        if not _between(columns, pattern.group, d_in):
            return f"{told}, which cuts a group of {pattern.group} columns in two"
        bits = pattern.index_bits * pattern.keep
        if any(edge // pattern.group * bits % 8 for edge in (columns.start, columns.stop) if edge != d_in):
            return f"{told}, which cuts a byte of positions in two ({bits} bits for {pattern.group} columns)"
        return None

    def _told(self, part: range, what: str, size: int) -> str:
        return f"one of {self.ranks} ranks holds {what} {part.start} to {part.stop} of {size}"

    def _rows(self, tensor: Tensor, unit: int = 1) -> Tensor:
        found = [tensor[rows.start // unit : rows.stop // unit] for rows in self.rows]
        return found[0] if len(found) == 1 else torch.cat(found)


def refusal_to_cut(layer: LayerFormat, ranks: int) -> str | None:
    """Why a pruned layer cannot be shared by so many ranks, in either of the two ways."""
    if any(size % ranks for size in layer.shape):
        return f"{layer.shape[0]}x{layer.shape[1]} cannot be cut into {ranks} equal parts both ways"
    cuts = Share.of_rows(layer.shape, 0, ranks), Share.of_columns(layer.shape, 0, ranks)  # the other ranks' are alike
    return next((reason for cut in cuts if (reason := cut.refusal(layer))), None)


def part_of(whole: range, rank: int, ranks: int) -> range:
    """The rank's part of a range that is as long as a multiple of ``ranks``."""
    size = len(whole) // ranks
    return range(whole.start + rank * size, whole.start + (rank + 1) * size)


def pieces(sizes: Sequence[int]) -> list[range]:
    """Ranges of so many rows, one after another."""
    ends = [sum(sizes[: count + 1]) for count in range(len(sizes))]
    return [range(end - size, end) for end, size in zip(ends, sizes, strict=True)]


def _between(part: range, unit: int, size: int) -> bool:
    """Whether a range begins and ends between two units, or at the end of all."""
    return all(edge % unit == 0 or edge == size for edge in (part.start, part.stop))
