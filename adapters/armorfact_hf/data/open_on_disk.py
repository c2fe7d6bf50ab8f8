"""Open a model folder without reading it: its decoder blocks stay on disk until they are asked for.

transformers loads it with accelerate's offloading to disk, which leaves the tensors where they are, in the safetensors
files, and renames them as for a model in memory. Those that it makes of others while it loads, such as stacks of
experts that are stored one by one, stay on the meta device, and are made when they are asked for (`stored_tensors`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, modeling_utils
from transformers.core_model_loading import build_glob_alternation

from armorfact_hf.checkpoint.folder import config_told, foreign_code_told
from armorfact_hf.data.stored_tensors import FolderFiles, StoredTensors, made_tensors
from armorfact_hf.data.wheels import cache_folder
from armorfact_hf.model.causal_lm import CausalLM
from armorfact_hf.model.conversions import Conversion, saved_tensors
from armorfact_hf.model.on_disk import HEAD, IN_MEMORY, Key, NotStreamable, OnDisk, Piece
from armorfact_hf.model.structure import decoder_blocks, shared_weights


def open_on_disk(folder: Path, dtype: str, device: torch.device) -> OnDisk:
    """The model of a folder, in evaluation mode, with its decoder blocks on the meta device.

    Args:
        folder: in Hugging Face's layout, safetensors only. dtype: "auto", or that of its weights.
        device: where blocks are put when they are asked for.

    Raises:
        NotStreamable: transformers makes tensors of it in a way that needs all of them.
        ValueError: a file or a tensor is missing or damaged.
    """
    files = FolderFiles.of(folder)
    with config_told(folder), foreign_code_told(folder):
        empty = _empty(folder)
    made = made_tensors(empty, files)
    StoredTensors.of(empty, files, made)  # names what is missing, before anything is read
    prefix, blocks = decoder_blocks(empty)
    if shared := shared_weights(prefix, blocks):
        [name, other, *_] = next(iter(shared.values()))
        raise NotStreamable(f"{name} is {other} as well, and blocks are read one at a time: {IN_MEMORY}")
    head = _own_head(empty)
    with _without_hooks():
        model: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            use_safetensors=True,
            trust_remote_code=False,
            device_map=_places(empty, prefix, head, made, device),
        )
    _keep_dtypes_(model)
    _refuse_unsavable(model)
    stored = StoredTensors.of(model, files, made)
    return OnDisk(
        model.eval(),
        decoder_blocks(model)[1],
        device,
        files.paths,
        stored,
        _pieces(model, prefix, head),
        cache_folder() / "digests",
        partial(open_on_disk, folder, dtype, device),
        stored.making,
    )


def _empty(folder: Path) -> CausalLM:
    """The model on the meta device, as its config has it."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
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


def _places(
    model: nn.Module, prefix: str, head: str | None, made: Mapping[str, Conversion], device: torch.device
) -> dict[str, Any]:
    """transformers' device map: the decoder blocks and a head of its own on disk, each other module on the device.

    What transformers would make for a block is on the meta device, where that costs nothing.
    """
    parts = prefix.split(".")
    above = {".".join(parts[:count]) for count in range(len(parts))}
    beside = [name for name, _ in model.named_modules() if name not in above and name.rpartition(".")[0] in above]
    on_disk = tuple(f"{name}." for name in (prefix, head) if name)
    modules = {name: "disk" if name in (prefix, head) else str(device) for name in beside}
    return modules | {name: "meta" for name in made if name.startswith(on_disk)}


@contextmanager
def _without_hooks() -> Iterator[None]:
    """Inside the context, transformers leaves models as their classes make them.

    It would give each module a hook of accelerate's that reads the module's tensors from disk in every forward pass.
    """
    dispatch = modeling_utils.accelerate_dispatch
    modeling_utils.accelerate_dispatch = lambda *_: None
    try:
        yield
    finally:
        modeling_utils.accelerate_dispatch = dispatch


def _keep_dtypes_(model: CausalLM) -> None:
    """Give parameters on the meta device the dtypes that transformers loads them in: some are kept in float32."""
    kept = model._get_dtype_plan(model.dtype)
    pattern, by_group, _ = build_glob_alternation(list(kept))
    for name, tensor in model.named_parameters() if kept else ():
        if tensor.is_meta and (found := pattern.search(name)):
            owner, _, key = name.rpartition(".")
            like = tensor.to(kept[by_group[str(found.lastgroup)]])
            setattr(model.get_submodule(owner), key, nn.Parameter(like, requires_grad=tensor.requires_grad))


def _refuse_unsavable(model: CausalLM) -> None:
    try:
        saved_tensors(model, model.state_dict())
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise NotStreamable(f"transformers cannot save this model tensor by tensor ({error}): {IN_MEMORY}") from error


def _pieces(model: CausalLM, prefix: str, head: str | None) -> dict[Key, Piece]:
    blocks = enumerate(model.get_submodule(prefix).children())
    pieces: dict[Key, Piece] = {index: _piece(f"{prefix}.{index}", block) for index, block in blocks}
    return pieces if head is None else pieces | {HEAD: _piece(head, model.get_submodule(head))}


def _piece(name: str, whole: nn.Module) -> Piece:
    named = ((f"{name}.{inner}".rstrip("."), module) for inner, module in whole.named_modules())
    return Piece({found: module for found, module in named if next(module.parameters(recurse=False), None) is not None})
