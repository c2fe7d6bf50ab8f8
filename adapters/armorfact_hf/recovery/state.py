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
from torch import Tensor

from armorfact_hf.pruning.resume.journal import Journal
from armorfact_hf.pruning.resume.seal import open_sealed, save_sealed

STATE = "state.safetensors"


@dataclass
class RunState:
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
    def from_dict(cls, found: Mapping[str, Any]) -> RunState:
        """The inverse of `dataclasses.asdict`, through JSON."""
        history = [(int(step), float(divergence)) for step, divergence in found["history"]]
        return cls(**{**found, "history": history})


def write_state(journal: Journal, tensors: Mapping[str, Tensor], progress: RunState) -> None:
    """Keep the state of the run.

    Raises:
        DiskFull: the disk has no room for it; the state before is kept.
    """
    state = json.dumps({"run": journal.run, **asdict(progress)})
    save_sealed(tensors, journal.folder / STATE, {"state": state})


def read_state_(journal: Journal, tensors: Mapping[str, Tensor]) -> RunState | None:
    """Copy the state that was kept into ``tensors``; None, and nothing is changed, where none was.

    Raises:
        ValueError: the file is damaged, or of another run.
    """
    path = journal.folder / STATE
    if not path.exists():
        return None
    with open_sealed(path, "the recovery starts from its first step") as stored:
        state = json.loads(stored.metadata()["state"])
        if state.pop("run") != journal.run:
            raise ValueError("it is of another run")
        with torch.no_grad():
            for name, tensor in tensors.items():
                # Copied into memory of PyTorch's own: aligned as in a run without interruption: the same bits.
                tensor.copy_(stored.get_tensor(name))
        return RunState.from_dict(state)
