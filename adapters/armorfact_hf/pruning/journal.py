"""The finished decoder blocks of a run, on disk: what a killed run resumes from.

One safetensors file a block holds the tensors of its pruned layers, and in its header the reports; `manifest.json` says
which model, settings and calibration tokens they belong to. Files are written beside their target and renamed, so a
file that is there is whole.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from armorfact import Pattern
from armorfact_hf.files import written_beside
from armorfact_hf.layers.linear import FactorizedLinear
from armorfact_hf.pruning.layer import LayerReport

MANIFEST = "manifest.json"
Pruned = list[tuple[FactorizedLinear, LayerReport]]


@dataclass(frozen=True)
class Finished:
    """The pruned layers of a decoder block with their reports, and the seconds that they took."""

    layers: Pruned
    seconds: float


class DifferentRun(ValueError):
    """A folder holds the work of another run; the message says what differs."""


@dataclass(frozen=True)
class Journal:
    """The folder of one run.

    Args:
        folder: holds the manifest and a file for each finished block.
        pattern: the N:M pattern of the run.
    """

    folder: Path
    pattern: Pattern

    @classmethod
    def open(cls, folder: Path, manifest: Mapping[str, Any], pattern: str | Pattern) -> Journal:
        """Start a journal in ``folder``, or continue the one that is there.

        Raises:
            DifferentRun: the folder belongs to a run with another manifest.
        """
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / MANIFEST
        if path.exists():
            check_same(_read_manifest(path), manifest, folder)
        elif any(not found.name.endswith(".part") for found in folder.iterdir()):
            raise DifferentRun(f"{folder} exists and holds no journal of armorfact: name another, or remove it")
        else:
            with written_beside(path) as draft:
                draft.write_text(json.dumps(manifest, indent=2), encoding="utf-8")
        return cls(folder, Pattern.parse(pattern))

    def write(self, key: str, finished: Finished) -> None:
        """Store a finished block under ``key``."""
        tensors = {
            f"{report.name}.{name}": tensor.contiguous()
            for layer, report in finished.layers
            for name, tensor in layer.state_dict().items()
        }
        reports = json.dumps([report.to_dict() for _, report in finished.layers])
        with written_beside(self._path(key)) as draft:
            save_file(tensors, draft, metadata={"reports": reports, "seconds": repr(finished.seconds)})

    def read(self, key: str, device: Any = None) -> Finished | None:
        """The block stored under ``key``, or None.

        Raises:
            ValueError: the file is damaged.
        """
        path = self._path(key)
        if not path.exists():
            return None
        try:
            with safe_open(path, "pt") as stored:
                header = stored.metadata()
                reports = [_report(values) for values in json.loads(header["reports"])]
                layers = [(self._layer(stored, report, device), report) for report in reports]
                return Finished(layers, float(header["seconds"]))
        except (SafetensorError, LookupError, TypeError, RuntimeError, ArithmeticError, ValueError) as error:
            raise ValueError(
                f"{path} is damaged ({error}); delete that one file, and its decoder block is pruned again"
            ) from error

    def _layer(self, stored: Any, report: LayerReport, device: Any) -> FactorizedLinear:
        prefix = f"{report.name}."
        names = [name.removeprefix(prefix) for name in stored.keys() if name.startswith(prefix)]  # noqa: SIM118
        tensors = {name: stored.get_tensor(prefix + name) for name in names}
        layer = FactorizedLinear(
            *report.shape,
            self.pattern,
            block=report.block,
            bias="bias" in tensors,
            dtype=tensors["values"].dtype,
            device=device,
        )
        # Copied into memory of PyTorch's own: aligned as in a run without interruption, and so the same bits.
        layer.load_state_dict(tensors)
        return layer

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"


def _report(values: dict[str, Any]) -> LayerReport:
    block = values["block"]
    return LayerReport(
        **values
        | {
            "shape": tuple(values["shape"]),
            "block": None if block is None else tuple(block),
            "notes": tuple(values["notes"]),
        }
    )


def _read_manifest(path: Path) -> Mapping[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError(f"expected a dictionary, got {type(found).__name__}")
        return found
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); delete its folder, and start again") from error


def check_same(stored: Mapping[str, Any], wanted: Mapping[str, Any], folder: Path) -> None:
    """Refuse to mix two runs.

    Raises:
        DifferentRun: names each entry that differs, with both values.
    """
    differing = [
        f"{key}: {_short(stored.get(key))} there, {_short(wanted.get(key))} now"
        for key in sorted({*stored, *wanted})
        if stored.get(key) != wanted.get(key)
    ]
    if differing:
        raise DifferentRun(
            f"{folder} belongs to another run ({'; '.join(differing)}). Give that run's arguments to continue it, "
            "name another output folder, or delete this one"
        )


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:36]}…"


def flat_manifest(config: Mapping[str, Any], **others: Any) -> dict[str, Any]:
    """A manifest with one entry for every setting, so that a difference can be named."""
    return {**{f"config.{key}": value for key, value in config.items()}, **others}


def model_fingerprint(model: nn.Module) -> str:
    """The sha256, in hexadecimal, over names, dtypes, shapes and bytes of all tensors of a model."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def tokens_fingerprint(tokens: Tensor) -> str:
    """The sha256, in hexadecimal, of token numbers."""
    return hashlib.sha256(_bytes(tokens.to(torch.int64))).hexdigest()


def _bytes(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy())
