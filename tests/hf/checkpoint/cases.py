"""Layers, descriptions and files to damage."""

from __future__ import annotations

import functools
import json
import struct
from pathlib import Path

import torch
from hypothesis import strategies as st
from safetensors.torch import save_file

from armorfact import BlockDiagonal, Core, Pattern
from armorfact_hf.checkpoint.description import Description
from armorfact_hf.checkpoint.shards import INDEX
from armorfact_hf.layers.format import LayerFormat
from armorfact_hf.layers.linear import FactorizedLinear

NAME = "model.layers.0.q_proj"
SETTINGS = {"deadline": None, "derandomize": True}


def random_layer(pattern="2:4", block=(8, 12), bias=True, dtype=torch.float32, shape=(16, 24), seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = functools.partial(torch.randn, generator=generator)
    pattern = Pattern.parse(pattern)
    weight = draw(shape)
    core = Core.from_dense(weight * pattern.top_mask(weight.abs()), pattern)
    left, right = (
        (None, None)
        if block is None
        else (BlockDiagonal(draw(d // b, b, b)) for d, b in zip(shape, block, strict=True))
    )
    return FactorizedLinear.of(core, left, right, draw(shape[0]) if bias else None).to(dtype)


def described(layers: dict[str, FactorizedLinear], sha256=None) -> Description:
    pattern = next(iter(layers.values())).pattern
    modules = {
        name: LayerFormat(name, (layer.out_features, layer.in_features), pattern, layer.block)
        for name, layer in layers.items()
    }
    return Description(pattern, "float32", modules, {"method": "armorfact"}, sha256 or {})


def tensors_of(layers: dict[str, FactorizedLinear]) -> dict[str, torch.Tensor]:
    held = {f"{name}.{part}": tensor for name, layer in layers.items() for part, tensor in layer.state_dict().items()}
    return {**held, "model.norm.weight": torch.ones(3), "model.scale": torch.tensor(0.5)}


def written(folder: Path, tensors, name="model.safetensors") -> Path:
    save_file(tensors, folder / name)
    return folder / name


def header_of(data: bytes) -> tuple[dict, bytes]:
    end = 8 + struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8:end]), data[end:]


def file_of(header, body: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def sharded(folder: Path, tensors) -> dict[str, str]:
    """Write a file for each of two halves, and the index; returns its weight map."""
    names = {name: f"model-0000{1 + k % 2}-of-00002.safetensors" for k, name in enumerate(sorted(tensors))}
    for file in set(names.values()):
        part = {name: tensor for name, tensor in tensors.items() if names[name] == file}
        written(folder, part, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": names}), encoding="utf-8")
    return names


def entry(**changes):
    return {"name": NAME, "shape": [16, 24], "block": [8, 12]} | changes


def config(**changes):
    modules = [entry(), entry(name="model.layers.0.k_proj", block=None)]
    found = {"quant_method": "armorfact", "version": 1, "pattern": "2:4", "dtype": "bfloat16", "modules": modules}
    sha256 = {f"{NAME}.values": "0123456789abcdef" * 4, "model.scale": "0" * 64}
    return found | {"prune": {"method": "armorfact", "sweeps": 20}, "sha256": sha256} | changes


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from([NAME, "2:4", 4]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)


def mutate_(data, node):
    """Replace, remove or add one value somewhere inside of a nest of dictionaries and lists."""
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        key = data.draw(st.sampled_from(keys)) if keys else None
        if key is None or not isinstance(node[key], dict | list) or data.draw(st.booleans()):
            break
        node = node[key]
    action = data.draw(st.sampled_from(["replace", "remove", "add"]))
    if key is not None and action == "remove":
        del node[key]
    elif key is not None and action == "replace":
        node[key] = data.draw(JUNK)
    elif isinstance(node, dict):
        node[data.draw(st.text(max_size=4))] = data.draw(JUNK)
    else:
        node.append(data.draw(JUNK))
