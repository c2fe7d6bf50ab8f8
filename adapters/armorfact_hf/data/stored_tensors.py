"""The tensors that a model's files hold, by the names that they have in the model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from accelerate.utils import OffloadedWeightsLoader
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.integrations.accelerate import accelerate_disk_offload

from armorfact_hf.checkpoint.damage import AGAIN, opened
from armorfact_hf.checkpoint.shards import shards
from armorfact_hf.model.causal_lm import CausalLM
from armorfact_hf.model.conversions import Conversion, loading_conversions
from armorfact_hf.model.on_disk import IN_MEMORY, NotStreamable


@dataclass(frozen=True)
class FolderFiles:
    """What the headers of a folder's safetensors files say.

    Args:
        folder: the folder. path: the file of each stored tensor. shape: its shape.
    """

    folder: Path
    path: Mapping[str, Path]
    shape: Mapping[str, tuple[int, ...]]

    @classmethod
    def of(cls, folder: Path) -> FolderFiles:
        """Read the headers.

        Raises:
            ValueError: a file is missing or damaged.
        """
        files, shapes = {}, {}
        for path in shards(folder):
            with opened(path) as stored:
                for name in stored.keys():  # noqa: SIM118
                    files[name], shapes[name] = path, tuple(stored.get_slice(name).get_shape())
        return cls(folder, files, shapes)

    @property
    def paths(self) -> tuple[Path, ...]:
        """All files."""
        return tuple(dict.fromkeys(self.path.values()))


@dataclass(frozen=True, eq=False)
class StoredTensors(Mapping[str, Tensor]):
    """The tensors of a model by name, read when they are asked for, and made of others where transformers does so.

    Args:
        model: says in which dtypes.
        files: the headers. index: where each tensor is that is stored by itself, in accelerate's form.
        made: what makes the others.
    """

    model: CausalLM
    files: FolderFiles
    index: Mapping[str, Mapping[str, str]]
    made: Mapping[str, Conversion]

    @classmethod
    def of(cls, model: CausalLM, files: FolderFiles, made: Mapping[str, Conversion]) -> StoredTensors:
        """The stored tensors of a model.

        Args:
            made: see `made_tensors`.

        Raises:
            ValueError: one that is on the meta device is in no file.
        """
        names = {"weight_map": {name: path.name for name, path in files.path.items()}}
        paths = [str(path) for path in files.path.values()]
        index = accelerate_disk_offload(model, None, paths, {"": "disk"}, names, get_model_conversion_mapping(model))
        held = {*index, *made}
        lacking = [name for name, tensor in model.state_dict().items() if tensor.is_meta and name not in held]
        if lacking:
            raise ValueError(
                f"{files.folder} lacks the tensors {', '.join(lacking[:5])} ({len(lacking)} in all): copy or download "
                "it again"
            )
        return cls(model, files, index, made)

    @property
    def making(self) -> int:
        """Bytes that are held beside a tensor, at most, while it is made: its parts, and what is half made of them."""
        return max((2 * self.model.get_parameter_or_buffer(name).nbytes for name in self.made), default=0)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.made:
            return self._whole[name]
        dtype = self.model.get_parameter_or_buffer(name).dtype
        return self.made[name].made(lambda part: self._parts[part].to(dtype))[name]

    def __iter__(self) -> Iterator[str]:
        return iter({**self.index, **self.made})

    def __len__(self) -> int:
        return len({**self.index, **self.made})

    @cached_property
    def _whole(self) -> OffloadedWeightsLoader:
        return OffloadedWeightsLoader(index=self.index)

    @cached_property
    def _parts(self) -> OffloadedWeightsLoader:
        """Stored tensors under the names that they have in the files."""
        places = {name: {"safetensors_file": str(path), "weight_name": name} for name, path in self.files.path.items()}
        return OffloadedWeightsLoader(index=places)


def made_tensors(model: CausalLM, files: FolderFiles) -> dict[str, Conversion]:
    """What makes those tensors of a model that transformers makes of stored ones, by their names in the model.

    Raises:
        NotStreamable: transformers makes them in a way that the shapes alone do not tell.
        ValueError: some that it takes are not stored.
    """
    found: dict[str, Conversion] = {}
    wanted = model.state_dict()
    for conversion in loading_conversions(model, files.path):
        parts = f"{conversion.parts[0][0]} and others"
        try:
            made = conversion.made(lambda part: torch.empty(files.shape[part], device="meta"))
        except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
            raise NotStreamable(
                f"transformers cannot make {conversion.target} of {parts} by their shapes alone ({error}): {IN_MEMORY}"
            ) from error
        for name in made.keys() & wanted.keys():
            shape, expected = list(made[name].shape), list(wanted[name].shape)
            if shape != expected:
                raise ValueError(
                    f"{files.folder} holds {len(conversion.parts)} tensors of which {name} is made ({parts}): they "
                    f"give the shape {shape}, expected {expected}; {AGAIN}"
                )
            found[name] = conversion
    return found
