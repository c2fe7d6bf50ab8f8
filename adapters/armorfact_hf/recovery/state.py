"""A recovery on disk: what a killed run resumes from, bit for bit.

The folder is a `Journal`: its manifest says which models, tokens and settings it belongs to, and one process writes to
it at a time. In place of finished blocks there is `state.safetensors`: the factors, as they are, as they were a step
before and at their best, and their momentum; in its header, as JSON, what else there is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from armorfact_hf.files import room_for, written_beside
from armorfact_hf.pruning.resume.entry import DAMAGE
from armorfact_hf.pruning.resume.journal import Journal
from armorfact_hf.pruning.resume.seal import BLANK, check_seal, seal

STATE = "state.safetensors"


@dataclass
class Progress:
    """What a run knows beside its tensors.

    Args:
        step: how many steps are done.
        factor: of the rate, halved with every step that was undone.
        history: pairs of steps done and the divergence then, on the windows kept aside.
        notes: what went wrong.
        seconds: that the steps took, those of earlier processes included.
    """

    step: int = 0
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


def write_state(journal: Journal, tensors: Mapping[str, Tensor], progress: Progress) -> None:
    """Keep the state of the run.

    Raises:
        DiskFull: the disk has no room for it; the state before is kept.
    """
    path = journal.folder / STATE
    state = json.dumps({"run": journal.run, **asdict(progress)})
    with room_for(path, sum(tensor.nbytes for tensor in tensors.values())), written_beside(path) as draft:
        save_file(dict(tensors), draft, metadata={"state": state, **BLANK})
        seal(draft)


def read_state_(journal: Journal, tensors: Mapping[str, Tensor]) -> Progress | None:
    """Copy the state that was kept into ``tensors``; None, and nothing is changed, where none was.

    Raises:
        ValueError: the file is damaged, or of another run.
    """
    path = journal.folder / STATE
    if not path.exists():
        return None
    try:
        check_seal(path)
        with safe_open(path, "pt") as stored:
            state = json.loads(stored.metadata()["state"])
            if state.pop("run") != journal.run:
                raise ValueError("it is of another run")
            with torch.no_grad():
                for name, tensor in tensors.items():
                    # Copied into memory of PyTorch's own: aligned as in a run without interruption: the same bits.
                    tensor.copy_(stored.get_tensor(name))
            return Progress.from_dict(state)
    except DAMAGE as error:
        raise ValueError(
            f"{path} is damaged ({error}); delete that one file, and the recovery starts from its first step"
        ) from error
