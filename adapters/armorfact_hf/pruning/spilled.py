"""Hidden states of calibration windows, and statistics that wait, in files instead of in memory.

A list of them costs memory for as many copies as a run keeps of every window: those of the pruned and of the dense
model, and those before the last blocks. Here each is a file, which copies of the list share and the last one removes.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import mkstemp
from typing import Any, Protocol

import torch
from torch import Tensor

from armorfact_hf.checkpoint.description import raw_bytes
from armorfact_hf.files import room_for
from armorfact_hf.model.moments import Statistics


class Hidden(Protocol):
    """The states of every window, None for those of which nothing was run yet: a list, or what acts as one."""

    def __len__(self) -> int: ...

    def __getitem__(self, window: int, /) -> Tensor | None: ...

    def __setitem__(self, window: int, states: Tensor | None, /) -> None: ...

    def copy(self) -> Hidden:
        """Another one, with the same states, that can be changed by itself."""


@dataclass(eq=False)
class _Stored:
    """A tensor in a file, which goes with this object.

    Args:
        like: on the meta device, of its dtype and shape. device: where it is read to.
    """

    path: Path
    like: Tensor
    device: torch.device

    @classmethod
    def of(cls, folder: Path, states: Tensor) -> _Stored:
        handle, name = mkstemp(".states", dir=folder)
        stored = cls(Path(name), states.detach().to("meta"), states.device)
        weakref.finalize(stored, stored.path.unlink, missing_ok=True)
        with room_for(stored.path, states.nbytes), open(handle, "wb") as file:
            file.write(raw_bytes(states))
        return stored

    def read(self) -> Tensor:
        # Into memory of PyTorch's own, aligned as the states of a run in memory, and so the same bits.
        tensor = torch.empty(self.like.shape, dtype=self.like.dtype)
        with self.path.open("rb") as file:
            file.readinto(raw_bytes(tensor))
        return tensor.to(self.device)


@dataclass
class Spilled:
    """The states of windows in the files of a folder.

    Args:
        folder: exists, and is removed by whoever made it.
        held: by window.
    """

    folder: Path
    held: list[_Stored | None]

    def __len__(self) -> int:
        return len(self.held)

    def __getitem__(self, window: int) -> Tensor | None:
        stored = self.held[window]
        return None if stored is None else stored.read()

    def __setitem__(self, window: int, states: Tensor | None) -> None:
        self.held[window] = None if states is None else _Stored.of(self.folder, states)

    def copy(self) -> Spilled:
        """Another list of the same files."""
        return Spilled(self.folder, list(self.held))


def nowhere(windows: int, folder: Path | None) -> Hidden:
    """The states of windows of which nothing was run yet; in files of ``folder`` if there is one."""
    nothing: list[None] = [None] * windows
    return [*nothing] if folder is None else Spilled(folder, [*nothing])


class _Parked(dict[str, Tensor]):
    """Tensors by name, each in a file that is read at every access."""

    def __init__(self, tensors: Mapping[str, Tensor], folder: Path) -> None:
        super().__init__()
        self.stored = {name: _Stored.of(folder, tensor) for name, tensor in tensors.items()}

    def __getitem__(self, name: str) -> Tensor:
        return self.stored[name].read()

    def get(self, name: str, default: Any = None) -> Any:
        """As of any dictionary."""
        return self[name] if name in self.stored else default


def set_aside(statistics: Any, folder: Path | None) -> Any:
    """Statistics that are only read from now on: those of this process in files of ``folder``, if there is one."""
    if folder is None or not isinstance(statistics, Statistics):
        return statistics
    return replace(statistics, gram=_Parked(statistics.gram, folder), cross=_Parked(statistics.cross, folder))
