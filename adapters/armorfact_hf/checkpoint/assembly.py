"""Write the folder of a pruned model that is not in memory, the same bytes as transformers writes from there."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from armorfact_hf.checkpoint.description import tensor_digest
from armorfact_hf.checkpoint.quantizer import put_digests_
from armorfact_hf.checkpoint.shard_file import write_shard
from armorfact_hf.checkpoint.shards import INDEX
from armorfact_hf.model.causal_lm import CausalLM

SHARD = "50GB"  # as transformers cuts them
Read = Callable[[str], Tensor]


def assemble(model: CausalLM, folder: Path, read: Read, shard: int | str = SHARD) -> None:
    """What ``model.save_pretrained(folder)`` writes, without more than one tensor in memory.

    Args:
        model: pruned; its tensors may be on the meta device. It is given the digests of what is written.
        read: gives a tensor by its name in the model.
        shard: the most that one file may hold.

    Raises:
        ValueError: transformers would make a tensor anew while it saves, or one that was read is another than expected.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stored = model.state_dict()
    origin = _origins(model, stored)
    shapes = {name: stored[source] for name, source in origin.items()}
    split = split_torch_state_dict_into_shards(
        shapes, filename_pattern="model{suffix}.safetensors", max_shard_size=shard
    )
    digests: dict[str, str] = {}

    def read_and_digest(name: str) -> Tensor:
        tensor = read(origin[name])
        digests[origin[name]] = tensor_digest(tensor)
        return tensor

    for file, names in split.filename_to_tensors.items():
        write_shard(folder / file, {name: shapes[name] for name in names}, read_and_digest)
    if split.is_sharded:
        metadata = {"total_parameters": model.num_parameters(), **split.metadata}
        index = json.dumps({"metadata": metadata, "weight_map": split.tensor_to_filename}, indent=2, sort_keys=True)
        (folder / INDEX).write_text(index + "\n", encoding="utf-8")
    # A tied tensor is written under one of its names, and has a digest under each.
    put_digests_(model, {name: digests.get(name) or tensor_digest(read(name)) for name in stored})
    _write_config(model, folder)


def _origins(model: CausalLM, stored: dict[str, Tensor]) -> dict[str, str]:
    """The name in the model of each tensor that is written, by the name that it is written under."""
    names = {id(tensor): name for name, tensor in stored.items()}
    written = {name: tensor for name, tensor in stored.items() if name not in (model._keys_to_ignore_on_save or ())}
    written = revert_weight_conversion(model, remove_tied_weights_from_state_dict(written, model))
    if made := [name for name, tensor in written.items() if id(tensor) not in names]:
        raise ValueError(f"transformers makes {made[0]} anew while it saves: prune the model in memory (--no-stream)")
    return {name: names[id(tensor)] for name, tensor in written.items()}


def _write_config(model: CausalLM, folder: Path) -> None:
    model.config.dtype = str(model.dtype).removeprefix("torch.")
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
