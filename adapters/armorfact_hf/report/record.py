"""What one pruning run did and what it cost: the record that a finished folder keeps as JSON and as a page.

`report.json` holds every number in full, and `report.html` is the same to read: one file that loads nothing else, so it
can be mailed, archived and opened offline. Neither is ever seen half written.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from armorfact_hf.data.origin import Origin
from armorfact_hf.layers.format import shown
from armorfact_hf.model.structure import DenseLayer
from armorfact_hf.pruning.config import PruneConfig
from armorfact_hf.pruning.layer import LayerReport, mean_loss
from armorfact_hf.pruning.tuning.matching import BlockReport
from armorfact_hf.recovery.report import Recovery
from armorfact_hf.typed_json import from_json

FORMAT_VERSION = 1
FILE = "report.json"


@dataclass(frozen=True)
class ModelFacts:
    """The dense model: its name for `load_model`, class, dtype, numbers of parameters and bytes, and fingerprint.

    ``origin`` is what the hub knows of it; files written before there were model cards lack it.
    """

    name: str
    architecture: str = field(metadata={"json": "class"})
    dtype: str
    parameters: int
    bytes: int
    fingerprint: str
    origin: Origin = field(default_factory=Origin)


@dataclass(frozen=True)
class CalibrationFacts:
    """The text, how many windows of how many tokens were taken from it, and the sha256 of these tokens."""

    text: str
    windows: int
    length: int
    sha256: str


@dataclass(frozen=True)
class Totals:
    """Of the run.

    Args:
        dense_bytes, bytes: of the pruned layers, before and after.
        wrapper_overhead: bytes of the wrappers over ``dense_bytes``.
        seconds: of wall time. peak_memory_bytes: the most that the process held.
    """

    dense_bytes: int
    bytes: int
    wrapper_overhead: float
    seconds: float
    peak_memory_bytes: int


@dataclass(frozen=True)
class MethodPerplexity:
    """What the model is worth after one method, and the mean relative loss of its layers there, where it is known."""

    name: str
    mean_loss: float | None
    perplexity: float


@dataclass(frozen=True)
class PerplexityRecord:
    """Perplexities on one text: the dense model's, those of the methods, and all that they depend on.

    Args:
        dense: perplexity of the dense model.
        text, split: name of the text, and which part of it. sha256: of its tokens.
        window, stride, bos, windows, chosen: see `armorfact_hf.evaluation.measure.MeasuredPerplexity`.
        tokens: how many were scored.
        methods: the perplexities after pruning.
    """

    dense: float
    text: str
    split: str
    sha256: str
    window: int
    stride: int
    bos: int | None
    windows: int | None
    chosen: str
    tokens: int
    methods: tuple[MethodPerplexity, ...] = ()

    @property
    def key(self) -> tuple[object, ...]:
        """What tells it from the other records of a report."""
        return self.text, self.sha256, self.window, self.stride, self.windows

    def merged(self, newer: PerplexityRecord) -> PerplexityRecord:
        """The newer record, with the methods that only this one has before its own."""
        names = {method.name for method in newer.methods}
        return replace(newer, methods=(*(x for x in self.methods if x.name not in names), *newer.methods))


@dataclass(frozen=True)
class TaskRecord:
    """Accuracy on one task before and after (None if only the dense model was asked), and its standard error (None of
    a single question)."""

    task: str
    questions: int
    dense: float
    pruned: float | None
    standard_error: float | None

    @property
    def key(self) -> tuple[object, ...]:
        """What tells it from the other records of a report."""
        return self.task, self.questions


@dataclass(frozen=True, kw_only=True)
class Report:
    """What pruning a model did and cost. A field with a default may be missing from older files.

    Args:
        format: version of the file's format. armorfact_version: that pruned.
        model, calibration, config: what was pruned, on which tokens, and how.
        manifest: what tells this run from others, flat.
        layers: what became of every pruned layer, in the order of the model.
        dense_layers: what stayed dense, and why.
        blocks: how every decoder block was tuned, where they were.
        totals: bytes, time and memory.
        evaluations, tasks: what was measured afterwards.
        recovery: how the model was tuned as a whole afterwards; the losses of its layers are those before.

    Raises:
        ValueError: another version of the format.
    """

    format: int = FORMAT_VERSION
    armorfact_version: str
    model: ModelFacts
    calibration: CalibrationFacts
    config: PruneConfig
    manifest: Mapping[str, object]
    layers: tuple[LayerReport, ...]
    dense_layers: tuple[DenseLayer, ...]
    totals: Totals
    evaluations: tuple[PerplexityRecord, ...] = ()
    tasks: tuple[TaskRecord, ...] = ()
    blocks: tuple[BlockReport, ...] = ()
    recovery: Recovery | None = None

    @classmethod
    def read(cls, folder: Path) -> Report:
        """The report of a finished folder.

        Raises:
            ValueError: there is none, or it is damaged: says where.
        """
        try:
            found = json.loads((folder / FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise ValueError(f"{folder} holds no report of armorfact: {error}") from error
        try:
            _check_version(found)
            return from_json(cls, found)
        except ValueError as error:
            raise ValueError(f"{folder / FILE}: {error}") from error

    def mean_loss(self, method: str | None = None) -> float:
        """`armorfact_hf.pruning.layer.mean_loss` of the method that was stored, or of a baseline."""
        return mean_loss(self.layers, method or self.config.method)

    def merged(self, evaluations: Sequence[PerplexityRecord], tasks: Sequence[TaskRecord]) -> Report:
        """The report with newer figures: they replace the same method's on the same text, or the same task's."""
        older = {record.key: record for record in self.evaluations}
        kept = {record.key for record in evaluations}, {record.key for record in tasks}
        return replace(
            self,
            evaluations=(
                *(record for record in self.evaluations if record.key not in kept[0]),
                *(older[record.key].merged(record) if record.key in older else record for record in evaluations),
            ),
            tasks=(*(record for record in self.tasks if record.key not in kept[1]), *tasks),
        )


def _check_version(found: object) -> None:
    """Before all else: another version may have other keys."""
    version = found.get("format") if isinstance(found, dict) else FORMAT_VERSION
    if type(version) is not int or version != FORMAT_VERSION:
        raise ValueError(
            f"format: expected version {FORMAT_VERSION}, got {shown(version)}: it takes the armorfact that wrote it"
        )
