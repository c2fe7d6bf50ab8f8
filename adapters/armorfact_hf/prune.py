"""Prune a model in memory, one decoder block after another."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import armorfact
from armorfact_hf.config import PruneConfig
from armorfact_hf.journal import Journal, Pruned, flat_manifest, model_fingerprint, tokens_fingerprint
from armorfact_hf.layer import LayerReport, damping_noted, fitting_block, prune_layers
from armorfact_hf.linear import FactorizedLinear
from armorfact_hf.statistics import Inputs, NonFiniteActivations, Statistics, first_nonfinite, recorded_inputs
from armorfact_hf.stream import BlockStream
from armorfact_hf.structure import DenseLayer, Layer, Select, chosen_layers, decoder_blocks

QUANT_METHOD = "armorfact"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class Step:
    """What a progress callback is told: ``done`` of ``total`` units of work, and what comes next."""

    done: int
    total: int
    doing: str


@dataclass(frozen=True)
class PruneReport:
    """What `prune_` did.

    Args:
        config: the settings.
        layers: a report for each pruned layer, in the order of the model.
        dense_layers: what stayed dense, and why.
        seconds: wall time, without what a resumed run found done.
    """

    config: PruneConfig
    layers: tuple[LayerReport, ...]
    dense_layers: tuple[DenseLayer, ...]
    seconds: float

    def mean_loss(self, method: str | None = None) -> float:
        """The mean relative loss over the layers, of the method of this run or of a baseline in its report."""
        name = self.config.method if method is None else method
        return float(np.mean([layer.losses[name] for layer in self.layers]))


def prune_(
    model: nn.Module,
    calibration: Any,
    config: PruneConfig | None = None,
    *,
    select: Select | None = None,
    journal: Path | str | None = None,
    progress: Callable[[Step], object] | None = None,
) -> PruneReport:
    """Replace linear layers of a causal language model by `FactorizedLinear`, block by block, in place.

    Args:
        model: of transformers, on any device. Its config is given the description that `load_pruned` reads.
        calibration: (windows, length) integer token numbers.
        config: what to prune and how; `PruneConfig()` by default.
        select: called with name and module of each layer that the config lets through; keeps it if true.
        journal: folder in which every finished block is kept. Called again with the same arguments on the same dense
            model, after a run that was killed, `prune_` continues from there and ends with the same weights.
        progress: called after each unit of work.

    Returns:
        The reports; the model is left in evaluation mode.

    Raises:
        ValueError: tokens that are not a matrix of numbers in the vocabulary, a model without decoder blocks, settings
            that leave nothing to prune, a model that is pruned already.
        DifferentRun: the journal belongs to other arguments.
        NonFiniteActivations: a module computes NaN or infinite values; nothing is changed from its block on.
    """
    config = PruneConfig() if config is None else config
    tokens = checked_tokens(model, calibration)
    refuse_pruned(model)
    layers, dense = fitting_layers(model, config, select)
    start = time.perf_counter()
    stored = None if journal is None else open_journal(Path(journal), model, tokens, config, layers)
    model.eval()
    run = _Run(model, list(tokens.split(1)), config, layers, stored, progress)
    with damping_noted():
        reports = tuple(run.reports())
    describe_(model, config, reports)
    return PruneReport(config, reports, (*dense, *run.untouched), time.perf_counter() - start)


def checked_tokens(model: nn.Module, calibration: Any) -> Tensor:
    """Calibration tokens as an int64 tensor (windows, length).

    Raises:
        ValueError: not a non-empty integer matrix, or numbers outside of the vocabulary.
    """
    tokens = torch.as_tensor(calibration)
    if tokens.ndim != 2 or 0 in tokens.shape or tokens.is_floating_point():
        raise ValueError(
            f"calibration must be a (windows, length) matrix of token numbers, got shape {tuple(tokens.shape)} of "
            f"{tokens.dtype}; armorfact_hf.windows cuts a text's tokens into one"
        )
    vocabulary = model.get_input_embeddings().num_embeddings
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= vocabulary:
        raise ValueError(
            f"calibration holds token numbers from {low} to {high}, the model's vocabulary has {vocabulary}: "
            "were they made by this model's own tokenizer?"
        )
    return tokens.to(torch.int64)


def refuse_pruned(model: nn.Module) -> None:
    """Raise ValueError if the model holds pruned layers already."""
    for name, module in model.named_modules():
        if isinstance(module, FactorizedLinear):
            raise ValueError(f"the model is pruned already ({name}); load the dense model again")


def fitting_layers(
    model: nn.Module, config: PruneConfig, select: Select | None = None
) -> tuple[list[Layer], list[DenseLayer]]:
    """The layers that will be pruned, and what stays dense with the reasons.

    Raises:
        ValueError: see `chosen_layers`; or no block fits any layer.
    """
    chosen, dense = chosen_layers(model, config.include, config.ignore, config.head, select)
    layers = []
    for layer in chosen:
        block, reason = fitting_block(layer.shape, config)
        if block is None:
            dense.append(DenseLayer(layer.name, reason))
        else:
            layers.append(layer)
    if not layers:
        raise ValueError(f"no layer can be pruned with these settings; {dense[-1].name}: {dense[-1].reason}")
    return layers, dense


def open_journal(
    folder: Path, model: nn.Module, tokens: Tensor, config: PruneConfig, layers: Sequence[Layer]
) -> Journal:
    """The journal of the run with these arguments, new or continued."""
    manifest = flat_manifest(
        config.to_dict(),
        armorfact=armorfact.__version__,
        model=model_fingerprint(model),
        calibration=tokens_fingerprint(tokens),
        layers=[layer.name for layer in layers],
    )
    return Journal.open(folder, manifest, config.pattern)


@dataclass
class _Run:
    """The loop over the decoder blocks.

    ``hidden`` holds, for each window, the states between two blocks that statistics are taken from; ``dense`` those of
    the dense model, where the target is its output.
    """

    model: nn.Module
    windows: list[Tensor]
    config: PruneConfig
    layers: list[Layer]
    journal: Journal | None
    progress: Callable[[Step], object] | None
    untouched: list[DenseLayer] = field(default_factory=list)
    done: int = 0

    def __post_init__(self) -> None:
        self.prefix, self.blocks = decoder_blocks(self.model)
        self.stream = BlockStream(self.model, self.blocks)
        self.hidden: list[Tensor | None] = [None] * len(self.windows)
        self.dense: list[Tensor | None] = [None] * len(self.windows)
        last = len(self.blocks) - 1
        self.last = max(last if x.decoder_block is None else x.decoder_block for x in self.layers)

    def reports(self) -> Iterator[LayerReport]:
        """Prune every block, then the head; the reports of their layers."""
        for index in range(self.last + 1):
            layers = [layer for layer in self.layers if layer.decoder_block == index]
            yield from self._prune_block(index, layers)
        for layer in self.layers:
            if layer.decoder_block is None:
                yield from self._replace(self._restored("head") or self._finish("head", [layer], self._at_head(layer)))
        self._tell(0, "done")

    def _prune_block(self, index: int, layers: list[Layer]) -> Iterator[LayerReport]:
        key = f"block-{index:04}"
        pruned = self._restored(key) if layers else []
        if pruned is None:
            pruned = self._finish(key, layers, self._inside_block(index, layers))
        else:
            self._tell(len(layers), f"decoder block {index + 1} is finished already")
            self._run_dense(index)
        yield from self._replace(pruned)
        if self.config.propagate == "pruned" and (index < self.last or self.config.head):
            for window in range(len(self.windows)):
                self.hidden[window] = self._states_after(index, window, self.hidden)

    def _restored(self, key: str) -> Pruned | None:
        return None if self.journal is None else self.journal.read(key, self.model.device)

    def _inside_block(self, index: int, layers: list[Layer]) -> Statistics:
        """The moments of the layers' inputs; what follows the dense model moves on to the next block."""
        modules = {layer.name: layer.module for layer in layers}
        statistics = Statistics(self.config.needs_correlations)
        for window in range(len(self.windows)):
            with recorded_inputs(modules) as inputs:
                states = self._states_after(index, window, self.hidden, inputs)
            dense = None
            if self.config.target == "output":
                with recorded_inputs(modules) as dense:
                    self.dense[window] = self._states_after(index, window, self.dense, dense)
            elif self.config.propagate == "dense":
                self.hidden[window] = states
            statistics.add(inputs, dense)
        return statistics

    def _run_dense(self, index: int) -> None:
        """Move on what follows the dense model, through a block that is still dense."""
        followers = {"pruned": self.dense if self.config.target == "output" else None, "dense": self.hidden}
        states = followers[self.config.propagate]
        for window in range(len(self.windows)):
            if states is None:
                self._tell(1, "")
            else:
                states[window] = self._states_after(index, window, states)

    def _states_after(
        self, index: int, window: int, states: list[Tensor | None], inputs: Inputs | None = None
    ) -> Tensor:
        """What block ``index`` makes of the states of a window, once that is finite."""
        tokens, hidden = self.windows[window], states[window]
        self._tell(1, f"decoder block {index + 1} of {len(self.blocks)}, window {window + 1}")
        after = self.stream.run(index, tokens, hidden)
        if not all(torch.isfinite(x).all() for x in (after, *(inputs.tensors.values() if inputs else ()))):
            block, name = self.blocks[index], f"{self.prefix}.{index}"
            culprit = first_nonfinite(block, name, lambda: self.stream.run(index, tokens, hidden)) or name
            raise NonFiniteActivations(
                f"{culprit} is the first module to return NaN or infinite values, on calibration window {window}; "
                "load the model in bfloat16 or float32, or leave that window out"
            )
        return after

    def _at_head(self, layer: Layer) -> Statistics:
        statistics = Statistics(self.config.needs_correlations)
        for window, hidden in enumerate(self.hidden):
            seen = Inputs()
            seen.see(layer.name, self.stream.head_input(layer.module, self.windows[window], hidden))
            dense = None
            if self.config.target == "output":
                dense = Inputs()
                dense.see(layer.name, self.stream.head_input(layer.module, self.windows[window], self.dense[window]))
            statistics.add(seen, dense)
        return statistics

    def _finish(self, key: str, layers: list[Layer], statistics: Statistics) -> Pruned:
        reached = [layer for layer in layers if layer.name in statistics.leader]
        self.untouched += [
            DenseLayer(layer.name, "no calibration token reached it") for layer in layers if layer not in reached
        ]
        work = [(layer, statistics.of(layer.name)) for layer in reached]
        pruned = prune_layers(work, self.config, lambda layer: self._tell(1, layer.name))
        if self.journal is not None:
            self.journal.write(key, pruned)
        return pruned

    def _replace(self, pruned: Pruned) -> Iterator[LayerReport]:
        for layer, report in pruned:
            self.model.set_submodule(report.name, layer)
            yield report

    def _tell(self, units: int, doing: str) -> None:
        """Say what comes next; it is counted as done when the next thing is said."""
        if self.progress is not None:
            passes = 1 + (self.config.propagate == "pruned") + (self.config.target == "output")
            total = len(self.layers) + passes * len(self.windows) * (self.last + 1)
            self.progress(Step(min(self.done, total), total, doing))
        self.done += units


def describe_(model: nn.Module, config: PruneConfig, reports: Sequence[LayerReport]) -> None:
    """Write into the model's config what its pruned layers are, so that `load_pruned` can make them again."""
    model.config.quantization_config = {
        "quant_method": QUANT_METHOD,
        "version": FORMAT_VERSION,
        "prune": config.to_dict(),
        "modules": {
            report.name: {"shape": list(report.shape), "block": None if report.block is None else list(report.block)}
            for report in reports
        },
    }
    if any(report.decoder_block is None for report in reports):
        model.config.tie_word_embeddings = False
