"""Projections that are given the same input, stacked into one weight and factorized with one B."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import cast

import torch
from torch import Tensor

from armorfact import BlockDiagonal, Core, Pattern, Result, factorize
from armorfact.sizes import fitting
from armorfact_hf.layers.linear import FactorizedLinear
from armorfact_hf.model.moments import Moments
from armorfact_hf.model.structure import Layer
from armorfact_hf.pruning.config import PruneConfig
from armorfact_hf.pruning.layer import LayerReport, shrunk
from armorfact_hf.pruning.losses import energy, layer_losses
from armorfact_hf.pruning.side_by_side import Keep, forget, prune_layers
from armorfact_hf.pruning.workers import in_process

Shape = tuple[int, int]
Work = Sequence[tuple[Layer, Moments]]
Pruned = tuple[FactorizedLinear, LayerReport]


@dataclass(frozen=True)
class Sharing:
    """How stacked projections are factorized.

    Args:
        square: blocks of A and B of one size; otherwise A takes what it took before, and B all that is left.
        relative: every projection counts by its relative loss, not by its own energy.
        apart: they are not stacked after all: each has a B, and all get the same square blocks. So much of what is
            gained comes from sharing out the bytes in another way.
    """

    square: bool = False
    relative: bool = False
    apart: bool = False


def common_block(shapes: Sequence[Shape], blocks: Sequence[Shape], sharing: Sharing, pattern: str = "2:4") -> Shape:
    """(block_out, block_in) of wrappers around such layers, of no more entries than their own wrappers have.

    Blocks of A lie within one layer.

    Args:
        shapes: (d_out, d_in) of the layers, with the same d_in. blocks: theirs, each of at least the pattern's group.
    """
    rows, d_in = [d_out for d_out, _ in shapes], shapes[0][1]
    lefts = sum(size * d_out for (size, _), d_out in zip(blocks, rows, strict=True))
    budget = lefts + sum(size * d_in for _, size in blocks)
    of_left = fitting(math.gcd(*rows), 1, math.gcd(*rows))
    of_right = fitting(d_in, Pattern.parse(pattern).group, d_in)
    if sharing.square or sharing.apart:
        rights = len(shapes) if sharing.apart else 1
        size = max(b for b in of_right if b in of_left and b * (sum(rows) + rights * d_in) <= budget)
        return size, size
    left = max(b for b in of_left if b * sum(rows) <= lefts)
    return left, max(b for b in of_right if left * sum(rows) + b * d_in <= budget)


def factorized_stack(layers: Sequence[Layer], gram: Tensor, config: PruneConfig, sharing: Sharing) -> Result:
    """One factorization of all rows of the layers.

    Args:
        layers: given the same inputs, with their own blocks. gram: of these inputs, (d_in, d_in).
    """
    stacked, given = torch.cat([layer.weight for layer in layers]), shrunk(gram, config.diagonal_weight)
    return factorize(
        stacked,
        given.float(),
        block=_block_of(layers, config, sharing),
        pattern=config.pattern,
        init=config.init,
        row_weight=relative_weights([layer.weight for layer in layers], given) if sharing.relative else None,
        max_sweeps=config.sweeps,
        rtol=config.rtol,
    )


def _block_of(layers: Sequence[Layer], config: PruneConfig, sharing: Sharing) -> Shape:
    blocks = [cast(Shape, layer.block) for layer in layers]
    return common_block([layer.shape for layer in layers], blocks, sharing, config.pattern)


def relative_weights(weights: Sequence[Tensor], gram: Tensor) -> Tensor:
    """The importance of every row by which a sum of losses is the mean of relative ones: (d_out of all,) float32."""
    energies = torch.tensor([energy(weight, gram) for weight in weights], dtype=torch.float64)
    each = energies.mean() / energies
    return each.repeat_interleave(torch.tensor([len(weight) for weight in weights])).float().to(gram.device)


def parts(result: Result, rows: Sequence[int]) -> Iterator[tuple[Core, BlockDiagonal, BlockDiagonal]]:
    """The factors of each of the stacked layers; B is that of all."""
    size, start = result.left.blocks.shape[-1], 0
    for count in rows:
        of_core = slice(start, start + count)
        of_left = slice(start // size, (start + count) // size)
        core = Core(result.core.values[of_core], result.core.packed[of_core], result.core.pattern, result.core.columns)
        yield core, BlockDiagonal(result.left.blocks[of_left]), result.right
        start += count


def prune_stack(layers: Sequence[Layer], moments: Moments, config: PruneConfig, sharing: Sharing) -> list[Pruned]:
    """What replaces layers that are given the same inputs, and their reports; B counts with the first."""
    start = time.perf_counter()
    result = factorized_stack(layers, moments.gram, config, sharing)
    seconds = (time.perf_counter() - start) / len(layers)
    found = []
    for layer, factors in zip(layers, parts(result, [layer.shape[0] for layer in layers]), strict=True):
        pruned = FactorizedLinear.of(*factors)
        report = LayerReport(
            name=layer.name,
            decoder_block=layer.decoder_block,
            shape=layer.shape,
            block=pruned.block,
            losses=layer_losses(layer.weight.float(), pruned, moments.gram, config, layer),
            objective_loss=result.loss / result.weight_loss,
            objective_initial_loss=result.initial_loss / result.weight_loss,
            sweeps=result.history[-1].number,
            seconds=seconds,
            dense_bytes=layer.weight.nbytes,
            bytes=pruned.nbytes - (factors[2].nbytes if found else 0),
            tokens=moments.tokens,
            status=result.status,
        )
        found.append((pruned, report))
    return found


def prune_shared(
    work: Work,
    config: PruneConfig,
    keep: Keep = forget,
    each: int | None = None,
    *,
    sharing: Sharing,
) -> list[Pruned]:
    """`prune_layers`, where layers of the same inputs share their B, or the size of their blocks."""
    groups: dict[int, list[tuple[Layer, Moments]]] = {}
    for layer, moments in work:
        groups.setdefault(id(moments.gram), []).append((layer, moments))
    alone, stacks = [], []
    for group in groups.values():
        layers = [layer for layer, _ in group]
        if sharing.apart:
            block = _block_of(layers, config, sharing)
            alone += [(replace(layer, block=block), moments) for layer, moments in group]
        elif len(group) > 1:
            stacks.append((layers, group[0][1]))
        else:
            alone += group
    found = prune_layers(alone, config, keep, each)
    for layers, moments in stacks:
        stacked = prune_stack(layers, moments, config, sharing)
        for pruned, report in stacked:
            keep(pruned, report)
        found += stacked
    by_name = {report.name: (pruned, report) for pruned, report in found}
    return [by_name[layer.name] for layer, _ in work]


def shared_right(sharing: Sharing | None) -> AbstractContextManager:
    """Inside, `prune_` shares B; no setting of the adapters asks for it. None changes nothing."""
    return nullcontext() if sharing is None else pruned_by(partial(prune_shared, sharing=sharing))


@contextmanager
def pruned_by(prune: Callable[..., list[Pruned]]) -> Iterator[None]:
    """Inside, `prune_` calls another function in the place of `prune_layers`."""
    kept = in_process.prune_layers
    in_process.prune_layers = prune
    try:
        yield
    finally:
        in_process.prune_layers = kept
