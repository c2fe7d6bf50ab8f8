"""The layers of one decoder block, pruned side by side."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any, TypeVar

import torch

from armorfact_hf.layers.linear import FactorizedLinear
from armorfact_hf.model.moments import Moments
from armorfact_hf.model.structure import Layer
from armorfact_hf.pruning.config import PruneConfig
from armorfact_hf.pruning.layer import LayerReport, prune_layer

Keep = Callable[[FactorizedLinear, LayerReport], object]
Result = TypeVar("Result")


def forget(layer: FactorizedLinear, report: LayerReport) -> None:
    """A `Keep` that keeps nothing."""


def prune_layers(
    work: Sequence[tuple[Layer, Moments]], config: PruneConfig, keep: Keep = forget, each: int | None = None
) -> list[tuple[FactorizedLinear, LayerReport]]:
    """`prune_layer` for the layers of one decoder block, in order; each is kept once it is done."""
    return side_by_side(
        lambda layer, moments: prune_layer(layer, moments, config), work, lambda pruned: keep(*pruned), each
    )


def side_by_side(
    act: Callable[..., Result],
    work: Sequence[tuple[Any, ...]],
    finished: Callable[[Result], object] = lambda result: None,
    each: int | None = None,
) -> list[Result]:
    """``act`` on the layers of one decoder block, in order.

    On the CPU they are worked on side by side, each by a share of the cores: that takes no longer than one after the
    other by all cores, and, as threads then hardly wait for each other, five times less on a machine with other work
    to do.

    Args:
        work: the arguments for each layer; the dense layer is the first of them.
        finished: called with each result once it is there, from the calling thread.
        each: the threads for a layer, where others of its block are not among these; see `threads_each`.
    """
    cores = torch.get_num_threads()
    each = threads_each([layer for layer, *_ in work], cores) if each is None else each
    if each == cores:
        return [_told(finished, act(*arguments)) for arguments in work]
    largest_first = sorted(range(len(work)), key=lambda k: -layer_flops(work[k][0]))
    pool = ThreadPoolExecutor(cores // each, initializer=torch.set_num_threads, initargs=(each,))
    try:
        futures = {pool.submit(act, *work[k]): k for k in largest_first}
        for future in as_completed(futures):
            finished(future.result())
    finally:
        stopped = not isinstance(sys.exception(), Exception | None)  # whoever presses Ctrl-C waits for nobody
        pool.shutdown(wait=not stopped, cancel_futures=True)
        torch.set_num_threads(cores)  # what the workers set counts for threads to come
    return [future.result() for future in sorted(futures, key=futures.__getitem__)]


def threads_each(layers: Sequence[Layer], cores: int) -> int:
    """The share of the cores that a layer is pruned by when these are: bits may depend on it. On a GPU, all."""
    at_once = len(layers) if all(layer.weight.device.type == "cpu" for layer in layers) else 1
    return max(1, cores // max(1, at_once))


def _told(finished: Callable[[Result], object], result: Result) -> Result:
    finished(result)
    return result


def layer_flops(layer: Layer) -> float:
    """What the work on a layer grows with: d_out d_in^2, its products with the Gram matrix."""
    d_out, d_in = layer.shape
    return float(d_out) * d_in * d_in
