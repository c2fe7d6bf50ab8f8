"""A spread of layers, each pruned alone in several ways: proxies and KL divergence of each, kept as they are found."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from armorfact_hf.data.calibration import Calibration
from armorfact_hf.data.load_model import Loaded, load_model
from armorfact_hf.data.texts import evaluation_source, tokens_of
from armorfact_hf.data.tokens import spread, windows
from armorfact_hf.files import written_beside
from armorfact_hf.model.structure import Layer, chosen_layers, decoder_blocks
from armorfact_hf.pruning.config import PruneConfig
from armorfact_hf.pruning.fitting import fitting_block
from benchmarks.evidence.divergence import Divergence
from benchmarks.evidence.methods import Method, Subject
from benchmarks.evidence.proxies import Grams
from benchmarks.evidence.traces import read_trace, write_traces
from benchmarks.kept import place_of

Json = dict[str, Any]


class Unfinished(Exception):
    """The seconds allowed have passed; what was measured is kept, and the same command goes on from there."""


@dataclass(frozen=True)
class Budget:
    """How long a run may take.

    Args:
        seconds: None is as long as it takes.
    """

    seconds: float | None = None
    start: float = field(default_factory=time.perf_counter)

    def check(self) -> None:
        """Raise `Unfinished` once the time has passed."""
        if self.seconds is not None and time.perf_counter() - self.start > self.seconds:
            raise Unfinished


@dataclass(frozen=True)
class Settings:
    """What everything is measured on.

    Args:
        calibration: windows for Gram matrices and gradients.
        labels: draw one at each so-manieth position for the gradients.
        text: of the KL divergence; windows and length of them, every: see `Divergence`.
    """

    calibration: Calibration = field(default_factory=lambda: Calibration(windows=12, length=1024))
    labels: int = 1
    text: str = "demo:gensim-enwiki"
    windows: int = 3
    length: int = 512
    every: int = 1


def spread_layers(model: torch.nn.Module) -> list[Layer]:
    """Every layer of three decoder blocks: after a sixth, a half and five sixths of the model."""
    count = len(decoder_blocks(model)[1])
    depths = {count // 6, count // 2, 5 * count // 6}
    return [layer for layer in chosen_layers(model)[0] if layer.decoder_block in depths]


@dataclass
class Experiment:
    """Everything about one model.

    Args:
        model: a name for `load_model`. folder: where figures and traces are kept. settings, budget: see there.
        depths: of `spread_layers`, measure those of these decoder blocks; None is all.
    """

    model: str
    folder: Path
    settings: Settings = Settings()
    budget: Budget = field(default_factory=Budget)
    depths: Sequence[int] | None = None

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        key = [self.model, asdict(self.settings)]
        self.path = place_of(self.folder, "figures", key)
        self.traces = place_of(self.folder, "traces", key).with_suffix("")
        kept = json.loads(self.path.read_text(encoding="utf-8")) if self.path.exists() else {}
        self.figures: Json = {"layers": {}, "points": {}} | kept

    def measure(self, methods: Mapping[str, Method]) -> None:
        """Fill in every figure that is missing.

        Raises:
            Unfinished: the budget is spent. ValueError: a depth without layers.
        """
        loaded = load_model(self.model, "bfloat16", log=lambda _: None)
        layers = spread_layers(loaded.model)
        wanted = self._wanted(layers)
        if not any(self._missing(layer, methods) for layer in wanted):
            return
        self._trace(loaded, layers)
        loaded.model.float()
        depths = sorted({layer.decoder_block for layer in wanted})
        divergence = Divergence(loaded.model, self._held_out(loaded), depths, self.settings.every)
        for layer in wanted:
            if missing := self._missing(layer, methods):
                self._layer(layer, layers, {name: methods[name] for name in missing}, divergence)

    def _wanted(self, layers: Sequence[Layer]) -> list[Layer]:
        there = sorted({layer.decoder_block for layer in layers})
        if self.depths is not None and not set(self.depths) <= set(there):
            raise ValueError(f"the layers are of the decoder blocks {there}: expected some of these, got {self.depths}")
        return [layer for layer in layers if self.depths is None or layer.decoder_block in self.depths]

    def _missing(self, layer: Layer, methods: Mapping[str, Method]) -> list[str]:
        return [name for name in methods if name not in self.figures["points"].get(layer.name, {})]

    def _trace(self, loaded: Loaded, layers: Sequence[Layer]) -> None:
        tokens = self.settings.calibration.tokens(loaded, lambda _: None)
        blocks = {layer.name: fitting_block(layer.shape, PruneConfig())[0][0] for layer in layers}
        write_traces(self.traces, loaded.model, layers, tokens, blocks, self.budget.check, self.settings.labels)

    def _held_out(self, loaded: Loaded) -> Tensor:
        text = tokens_of(evaluation_source(self.settings.text, lambda _: None), loaded)
        rows = windows(text, self.settings.length, bos=loaded.bos)
        return torch.stack([torch.from_numpy(row) for row in spread(rows, self.settings.windows)])

    def _layer(
        self, layer: Layer, layers: Sequence[Layer], methods: Mapping[str, Method], divergence: Divergence
    ) -> None:
        self.budget.check()
        grams = Grams(read_trace(self.traces, layers, layer))
        weight = layer.weight.clone()
        self.figures["layers"].setdefault(
            layer.name, grams.facts() | {"energies": grams.energies(weight, weight), "depth": layer.decoder_block}
        )
        for name, method in methods.items():
            self.budget.check()
            start = time.perf_counter()
            pruned = method(Subject(weight, grams))
            seconds = time.perf_counter() - start
            losses = grams.energies(weight - pruned, weight)
            point = {"losses": losses, "kl": divergence.of(layer, pruned), "seconds": seconds}
            self.figures["points"].setdefault(layer.name, {})[name] = point
            self._save()

    def _save(self) -> None:
        with written_beside(self.path) as draft:
            draft.write_text(json.dumps(self.figures, indent=1), encoding="utf-8")
