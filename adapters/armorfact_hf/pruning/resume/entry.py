"""Finished work of a run in one file: pruned layers, their reports, and what the file itself is.

A safetensors file holds the tensors, and in its header the reports, its own name, the run that it belongs to and a
digest over all of it (`armorfact_hf.pruning.resume.seal`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from armorfact import Pattern
from armorfact_hf.checkpoint.description import Description
from armorfact_hf.checkpoint.verify import verify
from armorfact_hf.layers.format import LayerFormat
from armorfact_hf.layers.linear import FactorizedLinear
from armorfact_hf.pruning.layer import LayerReport
from armorfact_hf.pruning.resume.seal import open_sealed, save_sealed
from armorfact_hf.pruning.tuning.matching import BlockReport
from armorfact_hf.typed_json import from_json, to_json

Pruned = list[tuple[FactorizedLinear, LayerReport]]


@dataclass(frozen=True)
class Finished:
    """Either pruned layers or, before any, prices.

    Args:
        layers: with their reports. seconds: that they took. matched: how their decoder block was tuned.
        prices: what pruning each layer costs the model, in nats a token (`armorfact_hf.pruning.prices`).
    """

    layers: Pruned
    seconds: float
    matched: BlockReport | None = None
    prices: Mapping[str, float] | None = None


@dataclass(frozen=True)
class _Header:
    """What stands in a file beside tensors."""

    key: str
    run: str
    seconds: float
    reports: tuple[LayerReport, ...]
    matched: BlockReport | None
    prices: Mapping[str, float] | None


@dataclass(frozen=True)
class Entry:
    """A file of finished work, there or not.

    Args:
        path: its name without the end is the key that stands in it.
        run: the digest of the manifest.
        pattern: the N:M pattern of the run.
        again: what happens again where the file is lost, in words.
    """

    path: Path
    run: str
    pattern: Pattern
    again: str

    def write(self, finished: Finished) -> None:
        """Store finished work.

        Raises:
            DiskFull: the disk has no room for it.
        """
        tensors = {
            f"{report.name}.{name}": tensor.contiguous()
            for layer, report in finished.layers
            for name, tensor in layer.state_dict().items()
        }
        reports = tuple(report for _, report in finished.layers)
        header = _Header(self.path.stem, self.run, finished.seconds, reports, finished.matched, finished.prices)
        save_sealed(tensors, self.path, {"block": json.dumps(to_json(header))})

    def read(self, device: Any = None) -> Finished | None:
        """What is stored, or None.

        Raises:
            ValueError: the file is damaged, or another than what was written under this name in this run.
        """
        if not self.path.exists():
            return None
        with self._open() as stored:
            return self._read(stored, device)

    def names(self) -> list[str]:
        """Of the tensors that are stored.

        Raises:
            ValueError: see `read`.
        """
        with self._open() as stored:
            return list(stored.keys())

    def _open(self) -> AbstractContextManager[Any]:
        return open_sealed(self.path, f"{self.again} again")

    def _read(self, stored: Any, device: Any) -> Finished:
        header = from_json(_Header, json.loads(stored.metadata()["block"]))
        self._check_place(header)
        formats = {report.name: self._format(stored, report) for report in header.reports}
        if left_over := [name for name in sorted(stored.keys()) if name.rpartition(".")[0] not in formats]:
            raise ValueError(f"it holds {', '.join(left_over)}, of which it has no report")
        verify([self.path], Description(self.pattern, "float32", formats, {}))
        layers = [(_layer(stored, formats[report.name], device), report) for report in header.reports]
        return Finished(layers, header.seconds, header.matched, header.prices)

    def _check_place(self, header: _Header) -> None:
        if header.run != self.run:
            raise ValueError("it is of another run")
        if header.key != self.path.stem:
            raise ValueError(f"it is {header.key} under another name")

    def _format(self, stored: Any, report: LayerReport) -> LayerFormat:
        """Blocks of the tail are rounded after they were kept for the first time, so the file says what it holds."""
        held = {f"{report.name}.{part}" for part in ("values", "left")}.intersection(stored.keys())
        whole = {name.rpartition(".")[2] for name in held if stored.get_slice(name).get_dtype() == "I8"}
        core, wrappers = ("int8" if part in whole else None for part in ("values", "left"))
        return LayerFormat(report.name, report.shape, self.pattern, report.block, None, core, wrappers)


def _layer(stored: Any, layout: LayerFormat, device: Any) -> FactorizedLinear:
    prefix = f"{layout.name}."
    names = [name.removeprefix(prefix) for name in stored.keys() if name.startswith(prefix)]  # noqa: SIM118
    tensors = {name: stored.get_tensor(prefix + name) for name in names}
    dtype = tensors[layout.floating].dtype
    layer = FactorizedLinear.empty(layout, "bias" in tensors, dtype, device)
    # Copied into memory of PyTorch's own: aligned as in a run without interruption, and so the same bits.
    layer.load_state_dict(tensors)
    return layer
