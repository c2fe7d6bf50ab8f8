"""Pruned models on disk: save, load, look inside, and export to ordinary dense weights.

A folder is what transformers writes (safetensors, `config.json`, tokenizer), with the factors of each pruned layer as
plain named tensors and their description under `quantization_config`. Nothing in it is executed or unpickled.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.initialization import no_init_weights
from transformers.pytorch_utils import Conv1D

from armorfact_hf.config import PruneConfig
from armorfact_hf.linear import FactorizedLinear
from armorfact_hf.prune import FORMAT_VERSION, QUANT_METHOD
from armorfact_hf.structure import is_linear

INDEX = "model.safetensors.index.json"


class NotPruned(ValueError):
    """A folder does not hold a model that armorfact pruned."""


@dataclass(frozen=True)
class Description:
    """What `config.json` says of the pruned layers.

    Args:
        config: the settings they were pruned with.
        modules: by module name, the shape (d_out, d_in) and the blocks, or None for a core alone.
    """

    config: PruneConfig
    modules: dict[str, tuple[tuple[int, int], tuple[int, int] | None]]

    @classmethod
    def of(cls, config: PretrainedConfig, folder: Path | str) -> Description:
        """Read it from a model's config.

        Raises:
            NotPruned: there is none.
            ValueError: it was written by another version of the format, or is malformed.
        """
        found = getattr(config, "quantization_config", None)
        if not isinstance(found, dict) or found.get("quant_method") != QUANT_METHOD:
            raise NotPruned(f"{folder} holds no model pruned by armorfact; `armorfact prune` makes one")
        if found.get("version") != FORMAT_VERSION:
            raise ValueError(
                f"{folder} is written in version {found.get('version')} of the format, this armorfact reads version "
                f"{FORMAT_VERSION}: install the version of armorfact that wrote it"
            )
        try:
            modules = {
                str(entry["name"]): (_pair(entry["shape"]), None if entry["block"] is None else _pair(entry["block"]))
                for entry in found["modules"]
            }
            return cls(PruneConfig.from_dict(found["prune"]), modules)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{folder}/config.json: its quantization_config is malformed ({error!r})") from error


def describe_folder(folder: Path) -> tuple[PretrainedConfig, Description]:
    """The config of a pruned folder, and what it says of the pruned layers.

    Raises:
        NotPruned, ValueError: see `Description.of`.
    """
    if not (folder / "config.json").is_file():
        raise NotPruned(
            f"{folder} is no folder of a model (it has no config.json): name one that `armorfact prune` wrote"
        )
    config = AutoConfig.from_pretrained(folder)
    return config, Description.of(config, folder)


def _pair(values: Any) -> tuple[int, int]:
    first, second = values
    return int(first), int(second)


def save_pruned(model: nn.Module, folder: Path | str, tokenizer: Any = None) -> None:
    """Write a pruned model, and its tokenizer if given, with transformers' own `save_pretrained`."""
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def load_pruned(folder: Path | str, device: Any = None, dtype: torch.dtype | None = None) -> nn.Module:
    """The model that a folder holds, in evaluation mode; its logits are those of the model that was saved.

    Args:
        folder: what `save_pruned` wrote.
        device: where the model goes. dtype: of its weights; None is the one they are stored in.

    Raises:
        NotPruned: the folder holds no pruned model.
        ValueError: a damaged or missing file, tensors that are missing, unexpected or of the wrong shape; each named.
    """
    folder = Path(folder)
    config, description = describe_folder(folder)
    dtype = dtype or config.dtype or torch.float32
    model = _skeleton(config, dtype)
    _place_layers(model, description, dtype)
    _load_tensors(model, folder)
    model.tie_weights()
    return model.to(device).eval() if device is not None else model.eval()


def _skeleton(config: PretrainedConfig, dtype: torch.dtype) -> nn.Module:
    """The dense model of a config, with weights of no meaning."""
    with no_init_weights():
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def _place_layers(model: nn.Module, description: Description, dtype: torch.dtype) -> None:
    modules = dict(model.named_modules())
    for name, (shape, block) in description.modules.items():
        module = modules.get(name)
        if module is None or not is_linear(module):
            raise ValueError(f"config.json lists {name} as pruned; the model has no linear layer of that name")
        layer = FactorizedLinear(*shape, description.config.pattern, block, module.bias is not None, dtype)
        model.set_submodule(name, layer)


def _load_tensors(model: nn.Module, folder: Path) -> None:
    """Fill every parameter and saved buffer of the model, and nothing else."""
    wanted = model.state_dict()
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    seen: set[str] = set()
    for name, tensor in stored_tensors(folder):
        if name not in wanted:
            raise ValueError(f"{folder}: tensor {name} belongs to no module of the model")
        held = wanted[name]
        if tensor.shape != held.shape or tensor.is_floating_point() != held.is_floating_point():
            raise ValueError(
                f"{folder}: tensor {name} is {tuple(tensor.shape)} of {tensor.dtype}, expected "
                f"{tuple(held.shape)} of {held.dtype}"
            )
        held.copy_(tensor)
        seen.add(name)
    if missing := sorted(set(wanted) - seen - tied):
        raise ValueError(f"{folder} lacks {len(missing)} tensors: {', '.join(missing[:5])}")


def shards(folder: Path) -> list[Path]:
    """The safetensors files of a folder, those that its index lists if it has one.

    Raises:
        ValueError: no file, or one of the index is missing.
    """
    index = folder / INDEX
    if index.exists():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{index} is damaged ({error!r}): copy or download it again") from error
    else:
        names = sorted(path.name for path in folder.glob("*.safetensors"))
    files = [folder / Path(name).name for name in names]
    if absent := [path.name for path in files if not path.is_file()]:
        raise ValueError(f"{folder} lacks {', '.join(absent)}, which its index lists: copy or download it again")
    if not files:
        raise ValueError(f"{folder} holds no safetensors file: save the model there with `save_pretrained`")
    return files


def stored_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a folder's safetensors files, one at a time.

    Raises:
        ValueError: a file that is damaged or missing.
    """
    for path in shards(folder):
        try:
            with safe_open(path, "pt") as stored:
                for name in stored.keys():  # noqa: SIM118
                    yield name, stored.get_tensor(name)
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged ({error}): copy or download it again") from error


def to_dense_(model: nn.Module) -> nn.Module:
    """Replace every pruned layer by an ordinary one with the weight A C B, in place; any tool can use the result."""
    pruned = {name: module for name, module in model.named_modules() if isinstance(module, FactorizedLinear)}
    with torch.device("meta"):
        dense = dict(_skeleton(model.config, model.dtype).named_modules())
    for name, layer in pruned.items():
        model.set_submodule(name, _dense_linear(dense[name], layer))
    if getattr(model.config, "quantization_config", None) is not None:
        del model.config.quantization_config
    return model


def _dense_linear(like: nn.Module, layer: FactorizedLinear) -> nn.Module:
    """The layer ``like`` of an empty dense model, with the weight and bias of a pruned one."""
    weight = layer.weight
    weight = weight.T.contiguous() if isinstance(like, Conv1D) else weight
    like.weight = nn.Parameter(weight, requires_grad=False)
    if layer.bias is not None:
        like.bias = nn.Parameter(layer.bias.detach().clone(), requires_grad=False)
    return like
