"""What this rank computes of each part of one of vLLM's linear layers."""

from __future__ import annotations

from dataclasses import replace

from vllm.model_executor.layers.linear import (
    LinearBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)

from armorfact_hf.layers.cuts import Share, part_of, pieces
from armorfact_hf.vllm.routing import ignoring


def shares(layer: LinearBase, parts: int) -> list[Share]:
    """The rank's share of each part, in the order of the layer's outputs.

    A layer that is fused in the checkpoint already is one part, whose rows are those of all outputs.

    Raises:
        ValueError: the layer is not made of so many parts, or is none of vLLM's own kinds.
    """
    found = _shares(layer, parts)
    computed, expected = sum(share.shape[0] for share in found), sum(layer.output_partition_sizes)
    if len(found) != parts or computed != expected:
        raise ValueError(
            f"{layer.prefix}: {parts} modules of the checkpoint make this {type(layer).__name__}, which has "
            f"{expected} outputs on a rank; expected {len(found)} modules with {computed}: {ignoring(layer.prefix)}"
        )
    return found


def _shares(layer: LinearBase, parts: int) -> list[Share]:
    d_out, d_in = layer.output_size, layer.input_size
    if isinstance(layer, RowParallelLinear):
        return [Share.of_columns((d_out, d_in), layer.tp_rank, layer.tp_size)]
    if isinstance(layer, ReplicatedLinear):
        return [Share.all_of((d_out, d_in))]
    outputs = _outputs(layer)
    if parts == len(outputs):
        cuts = [Share.of_rows((rows, d_in), rank, ranks) for rows, rank, ranks in outputs]
        return [replace(cut, ranks=layer.tp_size) for cut in cuts]  # keys and values may be cut for fewer
    whole = pieces([rows for rows, *_ in outputs])
    if layer.tp_size == 1:
        return [Share.all_of((whole[-1].stop, d_in))]
    held = tuple(part_of(piece, rank, ranks) for piece, (_, rank, ranks) in zip(whole, outputs, strict=True))
    return [Share((whole[-1].stop, d_in), held, range(d_in), layer.tp_size)]


def _outputs(layer: LinearBase) -> list[tuple[int, int, int]]:
    """Of each output of a column-parallel layer: its rows on all ranks, and which part of how many this one holds."""
    rank, ranks = layer.tp_rank, layer.tp_size
    if isinstance(layer, QKVParallelLinear):
        copies = layer.num_kv_head_replicas  # a head of keys and values is on so many ranks
        shared = rank // copies, ranks // copies
        heads, size = layer.total_num_kv_heads, layer.head_size
        of_keys, of_values = (heads * size, *shared), (heads * layer.v_head_size, *shared)
        return [(layer.total_num_heads * size, rank, ranks), of_keys, of_values]
    sizes = layer.output_sizes if isinstance(layer, MergedColumnParallelLinear) else [layer.output_size]
    return [(size, rank, ranks) for size in sizes]
