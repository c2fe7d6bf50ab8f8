"""Checks the safetensors files of a pruned model against its description, before anything is made of them.

Names, dtypes and shapes are compared in the headers of all files first; then tensors are read one at a time, for
`armorfact_hf.checkpoint.contents` to check.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from armorfact_hf.checkpoint.contents import check_contents
from armorfact_hf.checkpoint.damage import AGAIN, opened
from armorfact_hf.checkpoint.description import Description, tensor_digest
from armorfact_hf.checkpoint.folder import describe_folder
from armorfact_hf.checkpoint.shards import index_of, shards, weight_map
from armorfact_hf.layers.format import LayerFormat

INTEGERS = {torch.uint8: "U8", torch.int8: "I8"}
FLOATS = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
PORTION = 1 << 25  # bytes of a file that are looked at before it is opened anew


@dataclass(frozen=True)
class Verified:
    """What the files hold, now that they are known to be as described.

    Args:
        bytes: of the tensors of each pruned module, its bias left out.
        dtypes: of the floating tensors of each pruned module.
        digests: whether `config.json` has digests, with which every tensor that has one agreed.
        shapes: of all tensors, by name.
    """

    bytes: dict[str, int]
    dtypes: dict[str, torch.dtype]
    digests: bool
    shapes: dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class _Stored:
    """A tensor as the header of its file declares it."""

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.path}: tensor {self.name}"

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * (FLOATS[self.dtype].itemsize if self.dtype in FLOATS else 1)


def verify_folder(folder: Path | str, description: Description | None = None) -> Verified:
    """`verify` the files of a folder, and its index if it has one.

    Args:
        description: what its config.json says, read if it is not given.

    Raises:
        NotPruned: the folder holds no pruned model.
        ValueError: a file that is missing or damaged, an index that is damaged, names a file outside of the folder or
            disagrees with the files; and whatever `verify` finds.
    """
    folder = Path(folder)
    return _verify(_folder_headers(folder), description or describe_folder(folder))


def check_headers(folder: Path, description: Description) -> dict[str, tuple[int, ...]]:
    """The part of `verify_folder` that reads no tensors, but only which there are and how large; in milliseconds.

    Returns:
        The shapes of all tensors, by name.

    Raises:
        ValueError: see `verify_folder`.
    """
    tensors = _folder_headers(folder)
    _described(tensors, description)
    return {name: tensor.shape for name, tensor in tensors.items()}


def verify(files: Sequence[Path], description: Description) -> Verified:
    """Check that safetensors files hold the pruned layers of a description, whole and well formed.

    Args:
        files: all files of the model, each tensor in one of them. description: what `config.json` says of them.

    Raises:
        ValueError: names file and tensor. A file that is damaged; a tensor that is in two files, missing, unexpected
            under the name of a pruned module, of the wrong shape or dtype, or unlike its digest; a tensor of a pruned
            module without a digest while others have one; a pruned layer that is not described; and whatever
            `check_contents` finds.
    """
    return _verify(_headers(files), description)


def _folder_headers(folder: Path) -> dict[str, _Stored]:
    """The tensors of a folder by name, as its index lists them if it has one that counts."""
    tensors = _headers(shards(folder))
    if (index := index_of(folder)) is not None:
        _check_index(index, tensors)
    return tensors


def _headers(files: Sequence[Path]) -> dict[str, _Stored]:
    """The tensors of all files by name, from the headers."""
    tensors: dict[str, _Stored] = {}
    for path in files:
        with opened(path) as stored:
            for name in stored.keys():  # noqa: SIM118
                part = stored.get_slice(name)
                tensor = _Stored(path, name, part.get_dtype(), tuple(part.get_shape()))
                if name in tensors:
                    raise ValueError(f"{tensor} is in {tensors[name].path} too: remove the file that is left over")
                tensors[name] = tensor
    return tensors


def _check_index(index: Path, tensors: dict[str, _Stored]) -> None:
    listed = weight_map(index)
    for name in [*listed, *tensors]:
        tensor = tensors.get(name)
        held = None if tensor is None else tensor.path.name
        if held != listed.get(name):
            raise ValueError(
                f"{index} and the files disagree on tensor {name}: it is listed in {listed.get(name, 'no file')}, "
                f"and found in {held or 'none'}; copy or download the folder again"
            )


def _verify(tensors: dict[str, _Stored], description: Description) -> Verified:
    modules = _described(tensors, description)
    owners = {
        tensor.name: (part, description.modules[name])
        for name, held in modules.items()
        for part, tensor in held.items()
    }
    for tensor, data in _contents(tensors, {*owners, *description.sha256}):
        if tensor.name in description.sha256 and tensor_digest(data) != description.sha256[tensor.name]:
            raise ValueError(f"{tensor} is damaged (its sha256 differs): {AGAIN}")
        if tensor.name in owners:
            check_contents(str(tensor), data, *owners[tensor.name])
    return Verified(
        {name: sum(tensor.nbytes for part, tensor in held.items() if part != "bias") for name, held in modules.items()},
        {name: FLOATS[held[description.modules[name].floating].dtype] for name, held in modules.items()},
        bool(description.sha256),
        {name: tensor.shape for name, tensor in tensors.items()},
    )


def _described(tensors: dict[str, _Stored], description: Description) -> dict[str, dict[str, _Stored]]:
    """The tensors `_by_module`, once their headers are as described."""
    modules = _by_module(tensors, description.modules)
    for name, held in modules.items():
        _check_header(description.modules[name], held, description.sha256)
    _check_claimed({*tensors, *description.sha256}, description.modules)
    _check_missing(tensors, description.sha256)
    return modules


def _check_claimed(names: Collection[str], modules: Collection[str]) -> None:
    """No layer is stored as a pruned one that is not described as one: it would be made anew, with random weights."""
    for name in sorted(names):
        module, _, part = name.rpartition(".")
        if part == "positions" and f"{module}.values" in names and module not in modules:
            raise ValueError(
                f"the files or the digests hold {module}.values and {name}, a pruned layer that config.json does not "
                f"list under modules: copy or download config.json again"
            )


def _check_missing(tensors: Mapping[str, _Stored], sha256: Mapping[str, str]) -> None:
    """Whatever has a digest is stored, or what it may be tied to: an equal matrix, such as the embedding, or an equal
    bias, or an equal vector of the same name in another layer.

    Where a stored tensor has no digest, transformers renamed some when it saved, and none can be said to be missing.
    """
    if set(tensors) <= set(sha256):
        matrices = {sha256[name] for name, tensor in tensors.items() if len(tensor.shape) > 1}
        kin = {(_kind(name), sha256[name]) for name in tensors}
        away = ((name, digest) for name, digest in sha256.items() if name not in tensors and digest not in matrices)
        if missing := sorted(name for name, digest in away if (_kind(name), digest) not in kin):
            raise ValueError(f"the files lack {', '.join(missing[:5])} ({len(missing)} in all): {AGAIN}")


def _kind(name: str) -> str:
    return "bias" if name.endswith("bias") else ".".join(name.split(".")[-2:])


def _by_module(tensors: dict[str, _Stored], names: Collection[str]) -> dict[str, dict[str, _Stored]]:
    """For each pruned module the tensors under its name, by what follows the name."""
    modules: dict[str, dict[str, _Stored]] = {name: {} for name in names}
    for tensor in tensors.values():
        pieces = tensor.name.split(".")
        for count in range(1, len(pieces) + 1):
            if (module := ".".join(pieces[:count])) in modules:
                modules[module][".".join(pieces[count:])] = tensor
    return modules


def _check_header(layer: LayerFormat, held: dict[str, _Stored], sha256: Collection[str]) -> None:
    """Compare what is declared for one module with its description; no tensor is read."""
    expected = {**layer.tensors, "bias": layer.bias}
    needed = [part for part in expected if part != "bias" or f"{layer.name}.bias" in sha256]
    if missing := [part for part in needed if part not in held]:
        raise ValueError(
            f"the files lack {', '.join(f'{layer.name}.{part}' for part in missing)}, which the pruned module "
            f"{layer.name} needs: copy or download the folder again"
        )
    for part, tensor in held.items():
        if part not in expected:
            raise ValueError(
                f"{tensor} is unexpected: under the pruned module {layer.name} there are only "
                f"{', '.join(expected)}; save the model again, and leave the folder as it was written"
            )
        _check_dtype(tensor, part, layer, held[layer.floating].dtype)
        _check_shape(tensor, part, expected[part], layer)
        # Other tensors may lack one: transformers renames those of some families when it saves.
        if sha256 and tensor.name not in sha256:
            raise ValueError(f"{tensor} has no digest, although config.json lists those of the others: {AGAIN}")


def _check_dtype(tensor: _Stored, part: str, layer: LayerFormat, floating: str) -> None:
    floats = [floating] if floating in FLOATS else list(FLOATS)
    expected = [INTEGERS[layer.integers[part]]] if part in layer.integers else floats
    if tensor.dtype not in expected:
        raise ValueError(f"{tensor} is {tensor.dtype}, expected {' or '.join(expected)}: {AGAIN}")


def _check_shape(tensor: _Stored, part: str, expected: tuple[int, ...], layer: LayerFormat) -> None:
    if tensor.shape == expected:
        return
    why = ""
    if part == "values" and len(tensor.shape) == len(expected) and tensor.shape[:-1] == expected[:-1]:
        count = "more" if tensor.shape[-1] > expected[-1] else "fewer"
        why = f"holds {count} than {layer.pattern.keep} values in a group of {layer.pattern.group}: it "
    raise ValueError(
        f"{tensor} {why}has shape {list(tensor.shape)}, expected {list(expected)} in a module of shape "
        f"{list(layer.shape)}, pattern {layer.pattern} and block {layer.block}: {AGAIN}"
    )


def _contents(tensors: dict[str, _Stored], names: Collection[str]) -> Iterator[tuple[_Stored, Tensor]]:
    """Those of the tensors that have one of the names, one in memory at a time."""
    seen = 0

    def portion(tensor: _Stored) -> tuple[Path, int]:  # what was read stays in memory until its file is closed
        nonlocal seen
        seen += tensor.nbytes
        return tensor.path, seen // PORTION

    wanted = (tensor for tensor in tensors.values() if tensor.name in names)
    for (path, _), group in groupby(wanted, portion):
        with opened(path) as stored:
            for tensor in group:
                try:
                    data = stored.get_tensor(tensor.name)
                except (SafetensorError, AttributeError, TypeError, RuntimeError) as error:
                    # Of a dtype that PyTorch does not have, or empty and of a shape that is too long for it.
                    raise ValueError(f"{tensor} cannot be read ({error}): {AGAIN}") from error
                yield tensor, data
