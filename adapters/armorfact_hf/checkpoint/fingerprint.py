"""The sha256 of a model, wherever it is, and of tokens.

Of a model on disk, the tensors are read once, and again only when a file has changed: the digest of every tensor is
kept in the cache folder, under the names, sizes and times of the files that it was read from. The sha256 over them is
the one that the model has in memory.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from armorfact_hf.checkpoint.description import digests, tensor_digest
from armorfact_hf.files import remember
from armorfact_hf.model.causal_lm import CausalLM
from armorfact_hf.model.on_disk import OnDisk
from armorfact_hf.typed_json import from_json, to_json

# Keys of a config that do not change what a model computes: where it comes from, and what the tensors say themselves.
IGNORED = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "quantization_config")
PORTION = 1 << 24  # numbers that are looked at together: PyTorch makes copies to tell whether they are any


def model_fingerprint(model: nn.Module) -> str:
    """The sha256, in hexadecimal, over names, dtypes, shapes and bytes of all tensors of a model."""
    return fingerprint_of(digests(model.state_dict()))


def fingerprint_of(tensors: Mapping[str, str]) -> str:
    """The same, from the `tensor_digest` of each tensor."""
    lines = (f"{name} {digest}\n" for name, digest in sorted(tensors.items()))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def config_fingerprint(model: CausalLM) -> str:
    """The sha256, in hexadecimal, of what a model computes by beside its tensors: its class, and its config."""
    config = {key: value for key, value in model.config.to_dict().items() if key not in IGNORED}
    described = json.dumps([type(model).__name__, config], sort_keys=True, default=str)
    return hashlib.sha256(described.encode()).hexdigest()


def tokens_fingerprint(tokens: Tensor) -> str:
    """The sha256, in hexadecimal, of token numbers."""
    return tensor_digest(tokens.to(torch.int64))


@dataclass(frozen=True)
class _File:
    """A file as it was when it was read; nanoseconds since 1970."""

    path: str
    size: int
    changed: int

    @classmethod
    def of(cls, path: Path) -> _File:
        found = path.resolve().stat()
        return cls(str(path.resolve()), found.st_size, found.st_mtime_ns)


@dataclass(frozen=True)
class _Kept:
    """What is known of a model, and of which files it is known."""

    files: tuple[_File, ...]
    dtype: str
    digests: Mapping[str, str]


def disk_fingerprint(weights: OnDisk) -> str:
    """The `model_fingerprint` of a model on disk.

    Raises:
        ValueError: a tensor holds NaN or infinite values.
    """
    files, dtype = tuple(_File.of(path) for path in weights.files), str(weights.model.dtype)
    path = _path(weights, files, dtype)
    kept = _read(path)
    if kept is None or (kept.files, kept.dtype) != (files, dtype):
        kept = _Kept(files, dtype, {name: _digest(name, weights.read(name)) for name in weights.model.state_dict()})
        remember(path, json.dumps(to_json(kept)))
    return fingerprint_of(kept.digests)


def _digest(name: str, tensor: Tensor) -> str:
    parts = tensor.flatten().split(PORTION) if tensor.is_floating_point() else ()
    if not all(torch.isfinite(part).all() for part in parts):
        raise ValueError(f"{name} holds NaN or infinite values: copy or download the model again")
    return tensor_digest(tensor)


def _path(weights: OnDisk, files: tuple[_File, ...], dtype: str) -> Path:
    name = hashlib.sha256("\n".join([dtype, *(file.path for file in files)]).encode()).hexdigest()
    return weights.known / f"{name[:32]}.json"


def _read(path: Path) -> _Kept | None:
    """What is kept, or None where that is nothing or damaged: it is read from the model then."""
    try:
        return from_json(_Kept, json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return None
