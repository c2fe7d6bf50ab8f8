"""Names: which modules of a checkpoint a layer of vLLM's consists of, and where a pruned one cannot be."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

SHARDS = {"q": 0, "k": 1, "v": 2}  # what vLLM calls the parts of its fused attention projection


def part_names(prefix: str, packed: Mapping[str, Sequence[str]], pruned: Collection[str] = ()) -> list[str]:
    """The modules of a checkpoint that the layer of that name consists of, in their order.

    Args:
        packed: for the last part of a fused layer's name, those of the modules that are fused.
        pruned: the names of pruned modules. One that the checkpoint holds fused, as GLM-4's, is no parts, whatever
            ``packed`` says.

    >>> part_names("model.layers.0.mlp.gate_up_proj", {"gate_up_proj": ["gate_proj", "up_proj"]})
    ['model.layers.0.mlp.gate_proj', 'model.layers.0.mlp.up_proj']
    """
    stem, dot, last = prefix.rpartition(".")
    if prefix in pruned:
        return [prefix]
    return [f"{stem}{dot}{name}" for name in packed.get(last, [last])]


def part_number(shard: object, parts: int, layer: str) -> int:
    """Which of a layer's parts a tensor is for.

    Args:
        shard: as vLLM says it: "q", "k" or "v", a number, or None where a layer has one part.

    Raises:
        ValueError: the layer has no such part.
    """
    number = 0 if shard is None and parts == 1 else SHARDS.get(shard, shard) if isinstance(shard, str) else shard
    if type(number) is not int or not 0 <= number < parts:
        raise ValueError(
            f"{layer}: vLLM's model loads part {shard!r} of it, and it has {parts} in the checkpoint: {ignoring(layer)}"
        )
    return number


def refusal(name: str, found: str) -> str:
    """Why a pruned module cannot be served, where vLLM has something else than a linear layer in its place."""
    return f"{name} is pruned, and in vLLM's model it is {found}, which reads its weight itself: {ignoring(name)}"


def ignoring(name: str) -> str:
    """The way out for a layer that has to stay dense."""
    last = name.rpartition(".")[2]
    return (
        f"leave it dense: prune the dense model again with `armorfact prune --ignore {last}`, or without --head if it "
        "is the output head"
    )
