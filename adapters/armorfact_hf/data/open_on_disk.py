"""Open a model folder without reading it: its decoder blocks stay on disk until they are asked for.

transformers loads it with accelerate's offloading to disk, which leaves the tensors where they are, in the safetensors
files, and renames them as for a model in memory. What it would have to make anew while it loads is refused.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, remove_hook_from_submodules
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

from armorfact_hf.checkpoint.shards import shards
from armorfact_hf.model.causal_lm import CausalLM
from armorfact_hf.model.on_disk import HEAD, Key, OnDisk, Piece
from armorfact_hf.model.structure import decoder_blocks

IN_MEMORY = "prune it in memory (--no-stream)"


class NotStreamable(ValueError):
    """A model that can only be loaded as a whole; the message names the tensor that is why, and the way out."""


def open_on_disk(folder: Path, dtype: str, device: torch.device) -> OnDisk:
    """The model of a folder, in evaluation mode, with its decoder blocks on the meta device.

    Args:
        folder: in Hugging Face's layout, safetensors only. dtype: "auto", or that of its weights.
        device: where blocks are put when they are asked for.

    Raises:
        NotStreamable: transformers makes one of its tensors from others, or keeps it in another dtype.
        ValueError: a file or a tensor is missing or damaged.
    """
    files = tuple(shards(folder))
    empty = _empty(folder)
    _refuse_conversions(empty, files)
    prefix, blocks = decoder_blocks(empty)
    head = _own_head(empty)
    with _quiet():
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            use_safetensors=True,
            device_map=_places(empty, prefix, head, device),
            output_loading_info=True,
        )
    model, found = loaded
    if missing := sorted(found["missing_keys"]):
        raise ValueError(f"{folder} lacks the tensors {', '.join(missing[:5])} ({len(missing)} in all): copy or "
                         "download it again")
    _refuse_other_dtypes(model)
    return _without_hooks(model, prefix, head, device, files)


def _empty(folder: Path) -> CausalLM:
    """The model on the meta device, as its config has it."""
    config = AutoConfig.from_pretrained(folder)
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


def _refuse_conversions(model: CausalLM, files: tuple[Path, ...]) -> None:
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    wanted = model.state_dict()
    for name in _names(files) if converters else ():
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, wanted)
        if pattern is not None and name not in wanted:
            raise NotStreamable(
                f"transformers makes {target} of {name} and others while it loads them, which takes them all at once: "
                f"{IN_MEMORY}, or load the model once where it fits and save it with "
                "save_pretrained(save_original_format=False)"
            )


def _names(files: tuple[Path, ...]) -> Iterator[str]:
    for path in files:
        try:
            with safe_open(path, "pt") as stored:
                yield from stored.keys()
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is damaged ({error}): copy or download it again") from error


def _refuse_other_dtypes(model: CausalLM) -> None:
    """transformers keeps parts of some models in float32, and accelerate's index of files does not know."""
    kept = model._get_dtype_plan(model.dtype)
    pattern = build_glob_alternation(list(kept))[0] if kept else None
    for name, tensor in model.named_parameters():
        if pattern is not None and tensor.is_meta and pattern.search(name):
            raise NotStreamable(f"transformers keeps {name} in another dtype than {tensor.dtype}: {IN_MEMORY}")


def _without_hooks(
    model: CausalLM, prefix: str, head: str | None, device: torch.device, files: tuple[Path, ...]
) -> OnDisk:
    """The model as its class made it, and accelerate's loader by itself."""
    hooks = [getattr(module, "_hf_hook", None) for module in model.modules()]
    maps = [hook.weights_map for hook in hooks if isinstance(hook, AlignDevicesHook) and hook.offload]
    remove_hook_from_submodules(model)
    for leftover in ("hf_device_map", "to", "cuda"):  # accelerate replaces methods by ones that warn
        model.__dict__.pop(leftover, None)
    _, blocks = decoder_blocks(model)
    pieces: dict[Key, Piece] = {k: _piece(f"{prefix}.{k}", block) for k, block in enumerate(blocks)}
    if head is not None:
        pieces[HEAD] = _piece(head, model.get_submodule(head))
    stored = OffloadedWeightsLoader(index=maps[0].dataset.index)
    return OnDisk(model.eval(), blocks, device, files, stored, pieces)


def _piece(name: str, whole: nn.Module) -> Piece:
    named = ((f"{name}.{inner}".rstrip("."), module) for inner, module in whole.named_modules())
    return Piece({found: module for found, module in named if next(module.parameters(recurse=False), None) is not None})


@contextmanager
def _quiet() -> Iterator[None]:
    """accelerate warns that there are parameters on the meta device, as was asked for."""
    logger = logging.getLogger("accelerate.big_modeling")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
