"""The layers of one decoder block, pruned side by side."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed

import torch

from armorfact_hf.layers.linear import FactorizedLinear
from armorfact_hf.model.moments import Moments
from armorfact_hf.model.structure import Layer
from armorfact_hf.pruning.config import PruneConfig
from armorfact_hf.pruning.layer import LayerReport, prune_layer

Keep = Callable[[FactorizedLinear, LayerReport], object]


def forget(layer: FactorizedLinear, report: LayerReport) -> None:
    """A `Keep` that keeps nothing."""


def prune_layers(
    work: Sequence[tuple[Layer, Moments]], config: PruneConfig, keep: Keep = forget, each: int | None = None
) -> list[tuple[FactorizedLinear, LayerReport]]:
    """`prune_layer` for the layers of one decoder block, in order.

    On the CPU they are pruned side by side, each by a share of the cores: that takes no longer than one after the other
    by all cores, and, as threads then hardly wait for each other, five times less on a machine with other work to do.

    Args:
        keep: called with each layer once it is done, from the calling thread.
        each: the threads for a layer, where others of its block are not among these; see `threads_each`.
    """
    cores = torch.get_num_threads()
    each = threads_each([layer for layer, _ in work], cores) if each is None else each
    if each == cores:
        return [_kept(keep, *prune_layer(layer, moments, config)) for layer, moments in work]
    largest_first = sorted(range(len(work)), key=lambda k: -layer_flops(work[k][0]))
    pool = ThreadPoolExecutor(cores // each, initializer=torch.set_num_threads, initargs=(each,))
    try:
        futures = {pool.submit(prune_layer, *work[k], config): k for k in largest_first}
        for future in as_completed(futures):
            keep(*future.result())
    finally:
        stopped = not isinstance(sys.exception(), Exception | None)  # whoever presses Ctrl-C waits for nobody
        pool.shutdown(wait=not stopped, cancel_futures=True)
        torch.set_num_threads(cores)  # what the workers set counts for threads to come
    return [future.result() for future in sorted(futures, key=futures.__getitem__)]


def threads_each(layers: Sequence[Layer], cores: int) -> int:
    """The share of the cores that a layer is pruned by when these are: bits may depend on it. On a GPU, all."""
    at_once = len(layers) if all(layer.weight.device.type == "cpu" for layer in layers) else 1
    return max(1, cores // max(1, at_once))


def _kept(keep: Keep, layer: FactorizedLinear, report: LayerReport) -> tuple[FactorizedLinear, LayerReport]:
    keep(layer, report)
    return layer, report


def layer_flops(layer: Layer) -> float:
    """What the work on a layer grows with: d_out d_in^2, its products with the Gram matrix."""
    d_out, d_in = layer.shape
    return float(d_out) * d_in * d_in
