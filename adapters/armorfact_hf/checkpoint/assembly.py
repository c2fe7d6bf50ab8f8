"""Write the folder of a pruned model that is not in memory, the same bytes as transformers writes from there."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from armorfact_hf.checkpoint.description import tensor_digest
from armorfact_hf.checkpoint.quantizer import put_digests_
from armorfact_hf.checkpoint.shard_file import write_shard
from armorfact_hf.checkpoint.shards import INDEX
from armorfact_hf.layers.format import dtype_name
from armorfact_hf.model.causal_lm import CausalLM
from armorfact_hf.model.conversions import Read, Saved, saved_as, saved_tensors

SHARD = "50GB"  # as transformers cuts them


@dataclass(eq=False)
class _Reader:
    """Reads tensors by the names that they are written under, each once.

    Args:
        model: whose they are. read: gives a tensor by its name in the model. saved: what is to be written.
        digests: of the tensors that were read, by their names in the model.
        waiting: tensors that were made together with one that was asked for.
    """

    model: CausalLM
    read: Read
    saved: Mapping[str, Saved]
    digests: dict[str, str] = field(default_factory=dict)
    waiting: dict[str, Tensor] = field(default_factory=dict)

    def __call__(self, name: str) -> Tensor:
        sources = self.saved[name].sources
        if self.saved[name].whole:
            return self._read(sources[0])
        if name not in self.waiting:
            self.waiting |= saved_as(self.model, {source: self._read(source) for source in sources}, self.saved)
        return self.waiting.pop(name)

    def _read(self, source: str) -> Tensor:
        tensor = self.read(source)
        self.digests[source] = tensor_digest(tensor)
        return tensor


def assemble(model: CausalLM, folder: Path, read: Read, shard: int | str = SHARD) -> None:
    """What ``model.save_pretrained(folder)`` writes, tensor by tensor.

    In memory are one tensor at a time, and of those that transformers takes apart while it saves, such as stacks of
    experts that stay dense, what is not written yet.

    Args:
        model: pruned; its tensors may be on the meta device. It is given the digests of what is written.
        read: gives a tensor by its name in the model.
        shard: the most that one file may hold.

    Raises:
        ValueError: a tensor that was read is another than expected.
    """
    folder.mkdir(parents=True, exist_ok=True)
    held = model.state_dict()
    written = {name: tensor for name, tensor in held.items() if name not in (model._keys_to_ignore_on_save or ())}
    reader = _Reader(model, read, saved_tensors(model, remove_tied_weights_from_state_dict(written, model)))
    shapes = {name: saved.like for name, saved in reader.saved.items()}
    split = split_torch_state_dict_into_shards(
        shapes, filename_pattern="model{suffix}.safetensors", max_shard_size=shard
    )
    for file, names in split.filename_to_tensors.items():
        write_shard(folder / file, {name: shapes[name] for name in names}, reader)
    if split.is_sharded:
        metadata = {"total_parameters": model.num_parameters(), **split.metadata}
        index = json.dumps({"metadata": metadata, "weight_map": split.tensor_to_filename}, indent=2, sort_keys=True)
        (folder / INDEX).write_text(index + "\n", encoding="utf-8")
    # A tied tensor is written under one of its names, and has a digest under each.
    put_digests_(model, {name: reader.digests.get(name) or tensor_digest(read(name)) for name in held})
    _write_config(model, folder)


def _write_config(model: CausalLM, folder: Path) -> None:
    model.config.dtype = dtype_name(model.dtype)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
