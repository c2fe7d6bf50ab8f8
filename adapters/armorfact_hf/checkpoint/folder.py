"""Pruned models on disk: save and load.

A folder is what transformers writes (safetensors, `config.json`, tokenizer); docs/format.md tells what is in it.
Nothing in it is executed or unpickled.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForCausalLM

from armorfact_hf.checkpoint.config_file import CONFIG, read_config
from armorfact_hf.checkpoint.damage import AGAIN, opened
from armorfact_hf.checkpoint.description import Description, NotPruned
from armorfact_hf.checkpoint.measured import use_measured_
from armorfact_hf.checkpoint.shards import shards
from armorfact_hf.free_memory import ran_out
from armorfact_hf.model.causal_lm import CausalLM

DAMAGE = (
    *(SafetensorError, StrictDataclassError, OSError, RecursionError),
    *(LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError, ImportError),
)  # what reading broken JSON, or settings that mean nothing, leads to inside of transformers
ADAPTER = "adapter_config.json"
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def describe_folder(folder: Path) -> Description:
    """What a folder's config says of its pruned layers.

    Raises:
        NotPruned: there are none.
        ValueError: it was written by another version of the format, is malformed, or holds an adapter, which
            transformers would put into the model from files that are not looked at here.
    """
    if (folder / ADAPTER).exists():
        raise ValueError(
            f"{folder} holds an adapter beside the model ({ADAPTER}): keep it in a folder of its own, and load it by "
            "PEFT"
        )
    if not (folder / CONFIG).is_file():
        raise NotPruned(
            f"{folder} is no folder of a model (it has no config.json): name one that `armorfact prune` wrote"
        )
    return Description.from_dict(read_config(folder / CONFIG).get("quantization_config"), str(folder))


def local_folder(name: Path | str, revision: str | None = None) -> Path:
    """The folder of that name; or, for a name on the hub, the one that its files are kept in, fetched if need be.

    Args:
        revision: a branch, tag or commit, for a name on the hub.

    Raises:
        ValueError: it looks like a name on the hub, and cannot be had from there.
    """
    if isinstance(name, Path) or Path(name).is_dir() or HUB_NAME.fullmatch(name) is None:
        return Path(name)
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=["*.json", "*.safetensors"]))
    except (OSError, ValueError) as error:
        raise ValueError(f"{name!r} is no folder, and the hub does not give it: {error}") from error


def save_pruned(model: CausalLM, folder: Path | str, tokenizer: Any = None) -> None:
    """Write a pruned model, and its tokenizer if given, with transformers' own `save_pretrained`."""
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def load_pruned(folder: Path | str, device: Any = None, dtype: torch.dtype | None = None) -> CausalLM:
    """The model that a folder holds, in evaluation mode; its logits are those of the model that was saved.

    It is `AutoModelForCausalLM.from_pretrained`, which only warns of tensors that are missing, made strict.

    Args:
        folder: what `save_pruned` wrote, or its name on the hub, "owner/name".
        device: where the model goes. dtype: of its weights; None is the one they are stored in.

    Raises:
        NotPruned: the folder holds no pruned model.
        ValueError: a damaged or missing file, tensors that are missing, unexpected or of the wrong shape; each named.
    """
    folder = local_folder(folder)
    describe_folder(folder)
    shards(folder)  # names files that its index lists and that are not there
    with _damage_told(folder), foreign_code_told(folder):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype or "auto",
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    model, found = loaded
    refuse_missing(folder, found["missing_keys"])
    wrong = {
        "holds what belongs to no module": found["unexpected_keys"],
        "holds in another shape than the model's": {name for name, *_ in found["mismatched_keys"]},
    }
    for what, names in wrong.items():
        if names:
            raise ValueError(f"{folder} {what}: {', '.join(sorted(names)[:5])} ({len(names)} in all)")
    return model if device is None else use_measured_(model.to(device), folder)


def refuse_missing(where: Path | str, names: Collection[str]) -> None:
    """Raise ValueError if a model's files lack tensors of these names."""
    if names:
        raise ValueError(f"{where} lacks: {', '.join(sorted(names)[:5])} ({len(names)} in all): {AGAIN}")


@contextmanager
def foreign_code_told(name: Path | str) -> Iterator[None]:
    """What transformers says of a model that brings code of its own, which is not run, becomes a sentence.

    Raises:
        ValueError: that sentence.
    """
    try:
        yield
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise ValueError(
            f"{name} brings code of its own, and armorfact runs none of a checkpoint: take a model whose class is in "
            "transformers, or load it yourself and call `prune_`"
        ) from error


@contextmanager
def config_told(where: Path | str) -> Iterator[None]:
    """What transformers ends with on a dense model's config that it cannot follow becomes one error, with a sentence.

    Raises:
        ValueError: that sentence. ImportError: as it is; it names the package that is missing.
    """
    try:
        yield
    except ImportError:
        raise
    except OSError as error:
        raise ValueError(f"cannot load the model {str(where)!r}: {error}") from error
    except DAMAGE as error:
        if ran_out(error):
            raise
        raise ValueError(
            f"cannot load the model {str(where)!r} ({type(error).__name__}: {error}): its config.json is damaged, or "
            f"asks for what transformers {transformers.__version__} does not know: {AGAIN}, or upgrade transformers"
        ) from error


@contextmanager
def _damage_told(folder: Path) -> Iterator[None]:
    """What transformers ends with on damaged files becomes one error, with a sentence; others are let through."""
    try:
        yield
    except DAMAGE as error:
        if ran_out(error):
            raise
        raise ValueError(f"cannot load {folder} ({type(error).__name__}: {error}): {AGAIN}") from error


def stored_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a folder's safetensors files, one at a time.

    Raises:
        ValueError: a file that is damaged or missing.
    """
    for path in shards(folder):
        with opened(path) as stored:
            for name in stored.keys():  # noqa: SIM118
                yield name, stored.get_tensor(name)
