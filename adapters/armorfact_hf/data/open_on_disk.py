"""Open a model folder without reading it: its decoder blocks stay on disk until they are asked for.

transformers loads it with accelerate's offloading to disk, which leaves the tensors where they are, in the safetensors
files, and renames them as for a model in memory. What it would have to make anew while it loads is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.hooks import remove_hook_from_submodules
from accelerate.utils import OffloadedWeightsLoader
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    build_glob_alternation,
    rename_source_key,
)
from transformers.integrations.accelerate import accelerate_disk_offload

from armorfact_hf.checkpoint.shards import shards
from armorfact_hf.data.wheels import cache_folder
from armorfact_hf.model.causal_lm import CausalLM
from armorfact_hf.model.on_disk import HEAD, Key, NotStreamable, OnDisk, Piece
from armorfact_hf.model.structure import decoder_blocks
from armorfact_hf.quiet import quiet

IN_MEMORY = "prune it in memory (--no-stream)"


def open_on_disk(folder: Path, dtype: str, device: torch.device) -> OnDisk:
    """The model of a folder, in evaluation mode, with its decoder blocks on the meta device.

    Args:
        folder: in Hugging Face's layout, safetensors only. dtype: "auto", or that of its weights.
        device: where blocks are put when they are asked for.

    Raises:
        NotStreamable: transformers makes one of its tensors from others, or keeps it in another dtype.
        ValueError: a file or a tensor is missing or damaged.
    """
    files = _files_by_tensor(folder)
    empty = _empty(folder)
    _refuse_conversions(empty, files)
    _index(empty, folder, files)
    prefix, _ = decoder_blocks(empty)
    head = _own_head(empty)
    with quiet("accelerate.big_modeling"):  # warns of parameters on the meta device, as asked for
        model: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            use_safetensors=True,
            device_map=_places(empty, prefix, head, device),
        )
    _refuse_other_dtypes(model)
    stored = OffloadedWeightsLoader(index=_index(model, folder, files))
    _remove_hooks(model)
    return OnDisk(
        model.eval(),
        decoder_blocks(model)[1],
        device,
        tuple(dict.fromkeys(files.values())),
        stored,
        _pieces(model, prefix, head),
        cache_folder() / "digests",
    )


def _empty(folder: Path) -> CausalLM:
    """The model on the meta device, as its config has it."""
    config = AutoConfig.from_pretrained(folder)
    if getattr(config, "quantization_config", None) is not None:
        raise NotStreamable(f"{folder} holds quantized weights: {IN_MEMORY}, or take the ones they were made of")
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def _own_head(model: CausalLM) -> str | None:
    """The name of the head, if its weight is not that of the embedding."""
    head = model.get_output_embeddings()
    if head is None or head.weight is model.get_input_embeddings().weight:
        return None
    return next(name for name, module in model.named_modules() if module is head)


def _places(model: nn.Module, prefix: str, head: str | None, device: torch.device) -> dict[str, Any]:
    """transformers' device map: the decoder blocks and a head of its own on disk, each other module on the device."""
    parts = prefix.split(".")
    above = {".".join(parts[:count]) for count in range(len(parts))}
    beside = [name for name, _ in model.named_modules() if name not in above and name.rpartition(".")[0] in above]
    return {name: "disk" if name in (prefix, head) else str(device) for name in beside}


def _refuse_conversions(model: CausalLM, files: Mapping[str, Path]) -> None:
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    wanted = model.state_dict()
    for name in files if converters else ():
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, wanted)
        if pattern is not None and name not in wanted:
            raise NotStreamable(
                f"transformers makes {target} of {name} and others while it loads them, which takes them all at once: "
                f"{IN_MEMORY}, or load the model once where it fits and save it with "
                "save_pretrained(save_original_format=False)"
            )


def _files_by_tensor(folder: Path) -> dict[str, Path]:
    """The file of every tensor, from their headers."""
    found: dict[str, Path] = {}
    for path in shards(folder):
        try:
            with safe_open(path, "pt") as stored:
                found |= dict.fromkeys(stored.keys(), path)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is damaged ({error}): copy or download it again") from error
    return found


def _index(model: CausalLM, folder: Path, files: Mapping[str, Path]) -> dict[str, dict[str, str]]:
    """Where each tensor of the model is, in accelerate's form.

    Raises:
        ValueError: one is in no file.
    """
    names = {"weight_map": {name: path.name for name, path in files.items()}}
    paths = [str(path) for path in files.values()]
    index = accelerate_disk_offload(model, None, paths, {"": "disk"}, names, get_model_conversion_mapping(model))
    lacking = [name for name, tensor in model.state_dict().items() if tensor.is_meta and name not in index]
    if lacking:
        raise ValueError(
            f"{folder} lacks the tensors {', '.join(lacking[:5])} ({len(lacking)} in all): copy or download it again"
        )
    return index


def _refuse_other_dtypes(model: CausalLM) -> None:
    """transformers keeps parts of some models in float32, and accelerate's index of files does not know."""
    kept = model._get_dtype_plan(model.dtype)
    pattern = build_glob_alternation(list(kept))[0] if kept else None
    for name, tensor in model.named_parameters():
        if pattern is not None and tensor.is_meta and pattern.search(name):
            raise NotStreamable(f"transformers keeps {name} in another dtype than {tensor.dtype}: {IN_MEMORY}")


def _remove_hooks(model: CausalLM) -> None:
    """Leave the model as its class made it."""
    remove_hook_from_submodules(model)
    for module in model.modules():  # what it puts back is the class's own method, on the object
        if getattr(module.__dict__.get("forward"), "__func__", None) is type(module).forward:
            del module.forward
    for leftover in ("hf_device_map", "to", "cuda"):  # accelerate replaces methods by ones that warn
        model.__dict__.pop(leftover, None)


def _pieces(model: CausalLM, prefix: str, head: str | None) -> dict[Key, Piece]:
    blocks = enumerate(model.get_submodule(prefix).children())
    pieces: dict[Key, Piece] = {index: _piece(f"{prefix}.{index}", block) for index, block in blocks}
    return pieces if head is None else pieces | {HEAD: _piece(head, model.get_submodule(head))}


def _piece(name: str, whole: nn.Module) -> Piece:
    named = ((f"{name}.{inner}".rstrip("."), module) for inner, module in whole.named_modules())
    return Piece({found: module for found, module in named if next(module.parameters(recurse=False), None) is not None})
