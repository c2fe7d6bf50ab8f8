"""Write a safetensors file tensor by tensor, the same bytes as safetensors writes from a dictionary of all."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from armorfact_hf.checkpoint.description import raw_bytes

METADATA = {"format": "pt"}  # as transformers has it


def write_shard(path: Path, shapes: Mapping[str, Tensor], read: Callable[[str], Tensor]) -> None:
    """Write a file of tensors.

    Args:
        shapes: tensors of the dtypes and shapes to be written, by name; on the meta device or any other.
        read: gives each of them by its name. It is called once for each, in the order of the file.

    Raises:
        ValueError: what was read has another dtype or shape.
    """
    places = _layout(shapes)
    text = json.dumps({"__metadata__": METADATA, **places}, separators=(",", ":"), ensure_ascii=False).encode()
    header = text + b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for name in places:
            tensor, like = read(name), shapes[name]
            if (tensor.dtype, tensor.shape) != (like.dtype, like.shape):
                raise ValueError(
                    f"{name} is {tensor.dtype} {list(tensor.shape)}, expected {like.dtype} {list(like.shape)}"
                )
            file.write(raw_bytes(tensor))


def _layout(shapes: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    """The entries of the header, in the order that safetensors itself gives to tensors of these names and dtypes."""
    written = save({name: torch.empty(0, dtype=like.dtype) for name, like in shapes.items()})
    entries = json.loads(written[8 : 8 + int.from_bytes(written[:8], "little")])
    end = 0
    for name, entry in entries.items():
        start, end = end, end + shapes[name].nbytes
        entry |= {"shape": list(shapes[name].shape), "data_offsets": [start, end]}
    return entries
