"""A recovery on disk: what a killed run resumes from, bit for bit.

`manifest.json` says which models, tokens and settings the folder belongs to; `state.safetensors` holds the factors, the
moments and the best state, and in its header, as JSON, what else there is. Files are written beside their target and
renamed, so a file that is there is whole.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from armorfact_hf.files import written_beside
from armorfact_hf.pruning.journal import DifferentRun, check_same

MANIFEST, STATE, LOCK = "manifest.json", "state.safetensors", "lock"


@dataclass
class Progress:
    """What a run knows beside its tensors.

    Args:
        step: how many steps are done.
        count, last_rate: of `Adam`.
        factor: of the rate, halved with every step that was undone.
        history: pairs of steps done and the divergence then, on the windows kept aside.
        notes: what went wrong.
        seconds: that the steps took, those of earlier processes included.
    """

    step: int = 0
    count: int = 0
    last_rate: float = 0.0
    factor: float = 1.0
    history: list[tuple[int, float]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def best(self) -> tuple[int, float]:
        """The steps and the divergence of the best state, the first of equal ones."""
        return min(self.history, key=lambda measured: measured[1])

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> Progress:
        """The inverse of `dataclasses.asdict`, through JSON."""
        history = [(int(step), float(divergence)) for step, divergence in found["history"]]
        return cls(**{**found, "history": history})


@dataclass(frozen=True)
class StateFolder:
    """The folder of one run, held by one process; `opened` makes it."""

    folder: Path

    @classmethod
    @contextmanager
    def opened(cls, folder: Path, manifest: Mapping[str, Any]) -> Iterator[StateFolder]:
        """Start in ``folder``, or continue what is there; it is this process's alone inside the context.

        Raises:
            DifferentRun: the folder belongs to a run with another manifest, or holds something else.
            RuntimeError: another process works in it.
            ValueError: the manifest is damaged.
        """
        path = folder / MANIFEST
        if folder.exists() and not path.exists() and any(_foreign(found) for found in folder.iterdir()):
            raise DifferentRun(f"{folder} exists and holds no recovery of armorfact: name another, or remove it")
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(folder):
            if path.exists():
                check_same(_read_manifest(path), manifest, folder)
            else:
                with written_beside(path) as draft:
                    draft.write_text(json.dumps(manifest, indent=2), encoding="utf-8")
            yield cls(folder)

    def write(self, tensors: Mapping[str, Tensor], progress: Progress) -> None:
        """Keep the state of the run."""
        with written_beside(self.folder / STATE) as draft:
            save_file(dict(tensors), draft, metadata={"progress": json.dumps(asdict(progress))})

    @torch.no_grad()
    def read_(self, tensors: Mapping[str, Tensor]) -> Progress | None:
        """Copy the state that was kept into ``tensors``; None, and nothing is changed, where none was.

        Raises:
            ValueError: the file is damaged.
        """
        path = self.folder / STATE
        if not path.exists():
            return None
        try:
            with safe_open(path, "pt") as stored:
                progress = Progress.from_dict(json.loads(stored.metadata()["progress"]))
                _check_names(set(stored.keys()), set(tensors))
                for name, tensor in tensors.items():
                    tensor.copy_(_like(stored.get_tensor(name), tensor, name))
                return progress
        except (SafetensorError, LookupError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path} is damaged ({error}); delete that one file, and the recovery starts from its first step"
            ) from error


def _foreign(path: Path) -> bool:
    return path.name != LOCK and not path.name.endswith(".part")


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    try:
        with FileLock(folder / LOCK, timeout=0):
            yield
    except Timeout as error:
        raise RuntimeError(f"another process works in {folder}: wait for its end, or name another folder") from error


def _read_manifest(path: Path) -> Mapping[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError(f"expected a dictionary, got {type(found).__name__}")
        return found
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); delete its folder, and start again") from error


def _check_names(found: set[str], wanted: set[str]) -> None:
    if found != wanted:
        raise ValueError(f"its tensors differ from the model's, among them {min(found ^ wanted)}")


def _like(found: Tensor, tensor: Tensor, name: str) -> Tensor:
    if (found.dtype, found.shape) != (tensor.dtype, tensor.shape):
        raise ValueError(f"{name}: expected {tensor.dtype} {list(tensor.shape)}, got {found.dtype} {list(found.shape)}")
    return found
