"""What `config.json` says of a pruned model: its pruned layers, and the digests that guard its tensors.

Version 1 of the format; version 2 where experts are pruned, 3 where cores are int8, and 4 where wrappers are, or the
cores of experts, which those before have no words for. docs/format.md describes them for readers in other languages.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from armorfact import Pattern
from armorfact_hf.layers.format import LayerFormat, check_keys, shown

QUANT_METHOD = "armorfact"
# What an entry of a module may hold beside name, shape and block.
VERSIONS: dict[int, tuple[str, ...]] = {
    1: (),
    2: ("experts",),
    3: ("experts", "core_dtype"),
    4: ("experts", "core_dtype", "wrapper_dtype"),
}
DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
}


class NotPruned(ValueError):
    """A folder does not hold a model that armorfact pruned."""


@dataclass(frozen=True)
class Description:
    """What `config.json` says, under ``quantization_config``, of the pruned layers.

    Args:
        pattern: N:M, that of every core.
        dtype: name of the dtype in which the model was saved, such as "bfloat16".
        modules: the pruned layers, and stacks of experts' layers, by name, in the order of the model.
        prune: the settings that they were pruned with, for people; nothing is read with their help.
        sha256: the `digests` of the tensors of the whole model, or nothing.
    """

    pattern: Pattern
    dtype: str
    modules: dict[str, LayerFormat]
    prune: dict[str, Any]
    sha256: dict[str, str] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, found: Any, where: str) -> Description:
        """Read ``quantization_config`` strictly.

        Args:
            found: the parsed JSON. where: what errors call the place it came from.

        Raises:
            NotPruned: it is not armorfact's.
            ValueError: it is in another version of the format, or malformed; names the key or module, says what was
                expected and what came.
        """
        _check_version(found, where)
        try:
            return cls._parsed(found)
        except ValueError as error:
            raise ValueError(
                f"{where}: quantization_config is malformed: {error}; copy or download config.json again"
            ) from error

    @classmethod
    def _parsed(cls, found: Mapping[str, Any]) -> Description:
        known = ("quant_method", "version", "pattern", "dtype", "modules")
        check_keys("quantization_config", found, known, optional=("prune", "sha256"))
        if not isinstance(found["dtype"], str) or found["dtype"] not in DTYPES:
            raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {shown(found['dtype'])}")
        prune = found.get("prune", {})
        if not isinstance(prune, Mapping):
            raise ValueError(f"prune: expected an object, or nothing, got {shown(prune)}")
        pattern = _pattern(found["pattern"])
        modules = _modules(found["modules"], pattern, VERSIONS[found["version"]])
        parsed = cls(pattern, found["dtype"], modules, dict(prune), _sha256(found.get("sha256", {})))
        if parsed.version > found["version"]:  # its keys are known there, but not the two of them together
            raise ValueError(f"modules: expected no core_dtype of experts in version {found['version']}")
        return parsed

    @property
    def version(self) -> int:
        """The oldest version of the format that has words for it."""
        whole = [layer for layer in self.modules.values() if layer.core_dtype is not None]
        if whole:
            return 4 if any(layer.wrapper_dtype or layer.experts for layer in whole) else 3
        return 2 if self.has_experts else 1

    @property
    def has_experts(self) -> bool:
        """Whether experts are pruned."""
        return any(layer.experts is not None for layer in self.modules.values())

    def to_dict(self) -> dict[str, Any]:
        """The inverse of `from_dict`: plain JSON types."""
        found = {
            "quant_method": QUANT_METHOD,
            "version": self.version,
            "pattern": str(self.pattern),
            "dtype": self.dtype,
            # A list, since transformers sorts the keys of a dictionary.
            "modules": [layer.to_dict() for layer in self.modules.values()],
            "prune": dict(self.prune),
        }
        return found | ({"sha256": dict(self.sha256)} if self.sha256 else {})


def _check_version(found: Any, where: str) -> None:
    if not isinstance(found, Mapping) or found.get("quant_method") != QUANT_METHOD:
        raise NotPruned(f"{where} holds no model pruned by armorfact; `armorfact prune` makes one")
    version = found.get("version")
    if type(version) is not int or version not in VERSIONS:
        raise ValueError(
            f"{where} is written in version {shown(version)} of the format, this armorfact reads versions "
            f"{', '.join(map(str, VERSIONS))}: install the version of armorfact that wrote it"
        )


def _modules(entries: Any, pattern: Pattern, optional: tuple[str, ...]) -> dict[str, LayerFormat]:
    if not isinstance(entries, list | tuple) or not entries:
        raise ValueError(f"modules: expected a list of at least one module, got {shown(entries)}")
    modules: dict[str, LayerFormat] = {}
    for place, entry in enumerate(entries):
        layer = LayerFormat.from_dict(entry, place, pattern, optional)
        if layer.name in modules:
            raise ValueError(f"module {layer.name}: expected one entry of that name, got a second at modules[{place}]")
        modules[layer.name] = layer
    return modules


def _sha256(found: Any) -> dict[str, str]:
    if not isinstance(found, Mapping):
        raise ValueError(f"sha256: expected an object of a digest for each tensor, or nothing, got {shown(found)}")
    for name, digest in found.items():
        if not isinstance(name, str):
            raise ValueError(f"sha256: expected names of tensors, got {shown(name)}")
        if not isinstance(digest, str) or re.fullmatch("[0-9a-f]{64}", digest) is None:
            raise ValueError(
                f"sha256: expected 64 lower-case hexadecimal digits for tensor {name}, got {shown(digest)}"
            )
    return dict(found)


def _pattern(text: Any) -> Pattern:
    # A few plain digits only: the number of supports of a huge pattern takes for ever to work out.
    if not isinstance(text, str) or re.fullmatch(r"[1-9][0-9]{0,2}:[1-9][0-9]{0,2}", text) is None:
        raise ValueError(f"pattern: expected 'N:M' such as '2:4', got {shown(text)}")
    return Pattern.parse(text)


def digests(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The `tensor_digest` of each tensor by its name."""
    return {name: tensor_digest(tensor) for name, tensor in tensors.items()}


def tensor_digest(tensor: Tensor) -> str:
    """The sha256, in hexadecimal, of a tensor's dtype, shape and bytes: it tells damage, not malice.

    What is hashed is a line of text such as ``bfloat16 [64, 32]`` and a newline, then the elements in row-major order,
    little-endian. A tensor on another device or not contiguous is copied once.

    Args:
        tensor: of any dtype, shape and device.
    """
    digest = hashlib.sha256(f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}\n".encode())
    digest.update(raw_bytes(tensor))
    return digest.hexdigest()


def raw_bytes(tensor: Tensor) -> memoryview:
    """The elements of a tensor in row-major order; copied only if it is on another device or not contiguous."""
    whole = tensor.detach().cpu().contiguous()
    flat = whole.as_strided((whole.numel(),), (1,))  # reshape(-1) keeps the odd stride of a single element or of none
    return flat.view(torch.uint8).numpy().data
