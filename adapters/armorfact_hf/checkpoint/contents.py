"""Checks the numbers of a pruned layer's tensors: floats that are finite, positions that form groups."""

from __future__ import annotations

import torch
from torch import Tensor

from armorfact import Pattern
from armorfact.packed import unpack_positions
from armorfact_hf.checkpoint.damage import AGAIN
from armorfact_hf.layers.format import LayerFormat

PANEL = 1 << 22  # elements that are unpacked at once


def check_contents(where: str, data: Tensor, part: str, layer: LayerFormat) -> None:
    """Check the elements of a tensor whose shape and dtype are right.

    Args:
        where: what errors call the tensor. data: the tensor. part: its name under the module. layer: the module.

    Raises:
        ValueError: values that are NaN or infinite; more or fewer than N positions in a group of M, positions out of
            their group or not ascending; padding that is not zero.
    """
    if part != "positions":
        if data.is_floating_point():
            _check_finite(where, data)
    elif not _bytes_are_valid(rows := data.flatten(0, -2), layer):
        _check_positions(where, rows, layer)


def _check_finite(where: str, data: Tensor) -> None:
    extremes = torch.stack(data.aminmax())  # NaN if any is; no copy of the data is made
    if extremes.isfinite().all():
        return
    count = sum(int((~panel.isfinite()).sum()) for panel in data.reshape(-1).split(PANEL))
    raise ValueError(f"{where} holds {count} values that are NaN or infinite: {AGAIN}, or prune the model again")


def _bytes_are_valid(packed: Tensor, layer: LayerFormat) -> bool:
    """Whether every byte is one that can occur, where whole groups fit a byte; False says: look more closely."""
    bits = layer.pattern.index_bits * layer.pattern.keep
    if 8 % bits:
        return False
    per_byte = 8 // bits
    in_last = layer.shape[1] // layer.pattern.group % per_byte or per_byte
    last = torch.bincount(packed[:, -1], minlength=256)
    others = torch.bincount(packed.reshape(-1), minlength=256) - last
    wrong = others[~_valid_bytes(layer.pattern, per_byte)].any() or last[~_valid_bytes(layer.pattern, in_last)].any()
    return not wrong


def _valid_bytes(pattern: Pattern, groups: int) -> Tensor:
    """(256,) bool: the bytes that hold so many valid groups, and zeros above them."""
    every = torch.arange(256)
    count = groups * pattern.keep
    positions = unpack_positions(every.to(torch.uint8)[:, None], pattern.index_bits, count)
    valid = _valid_groups(positions.reshape(256, groups, pattern.keep), pattern).all(-1)
    return valid & (every >> count * pattern.index_bits == 0)


def _valid_groups(positions: Tensor, pattern: Pattern) -> Tensor:
    """(..., groups) bool: which groups of positions (..., groups, N) are ascending and inside of the group."""
    ascending = (positions[..., 1:] > positions[..., :-1]).all(-1)
    return ascending & (positions < pattern.group).all(-1)


def _check_positions(where: str, packed: Tensor, layer: LayerFormat) -> None:
    """Unpack a panel of rows at a time, and name the first group that is wrong."""
    bits, pattern = layer.pattern.index_bits, layer.pattern
    used = layer.kept * bits % 8
    if used and (packed[:, -1] >> used).any():
        raise ValueError(f"{where}: the unused high bits of a row's last byte are not zero: {AGAIN}")
    rows = max(1, PANEL // layer.kept)
    for number, panel in enumerate(packed.split(rows)):
        positions = unpack_positions(panel, bits, layer.kept).reshape(len(panel), -1, pattern.keep)
        valid = _valid_groups(positions, pattern)
        if not valid.all():
            row, group = divmod(int(valid.flatten().to(torch.uint8).argmin()), valid.shape[1])
            wrong = _fault(positions[row, group].tolist(), pattern)
            raise ValueError(f"{where}: group {group} of row {number * rows + row} {wrong}: {AGAIN}")


def _fault(positions: list[int], pattern: Pattern) -> str:
    """What is wrong with the positions of one group."""
    if max(positions) >= pattern.group:
        return f"has positions {positions}, expected numbers below {pattern.group}"
    if len(set(positions)) < pattern.keep:
        return f"keeps fewer than {pattern.keep} of {pattern.group}: a position occurs twice in {positions}"
    return f"has positions {positions}, expected them to ascend"
