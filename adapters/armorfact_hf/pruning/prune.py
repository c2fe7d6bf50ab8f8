"""Prune a model in memory, one decoder block after another."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import armorfact
from armorfact import Pattern
from armorfact_hf.checkpoint.description import Description
from armorfact_hf.checkpoint.quantizer import attach_
from armorfact_hf.layers.format import LayerFormat
from armorfact_hf.layers.linear import FactorizedLinear
from armorfact_hf.model.structure import DenseLayer, Layer, Select
from armorfact_hf.pruning.block_by_block import BlockByBlock, Step
from armorfact_hf.pruning.config import PruneConfig
from armorfact_hf.pruning.fitting import fitting_layers
from armorfact_hf.pruning.journal import Journal, flat_manifest, model_fingerprint, tokens_fingerprint
from armorfact_hf.pruning.layer import LayerReport
from armorfact_hf.pruning.notes import damping_noted


@dataclass(frozen=True)
class PruneReport:
    """What `prune_` did.

    Args:
        config: the settings.
        layers: a report for each pruned layer, in the order of the model.
        dense_layers: what stayed dense, and why.
        seconds: wall time, that of the finished blocks which a resumed run found included.
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
    model.eval()
    with ExitStack() as until_done:
        stored = None
        if journal is not None:
            stored = until_done.enter_context(open_journal(Path(journal), model, tokens, config, layers))
        run = BlockByBlock(model, list(tokens.split(1)), config, layers, stored, progress)
        with damping_noted():
            reports = tuple(run.reports())
    describe_(model, config, reports)
    pruned = {report.name for report in reports}
    dense += [DenseLayer(x.name, "no calibration token reached it") for x in layers if x.name not in pruned]
    return PruneReport(config, reports, tuple(dense), run.earlier + time.perf_counter() - start)


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


def describe_(model: nn.Module, config: PruneConfig, reports: Sequence[LayerReport]) -> None:
    """Write into the model's config what its pruned layers are, so that transformers saves and loads them."""
    pattern = Pattern.parse(config.pattern)
    layers = {report.name: LayerFormat(report.name, report.shape, pattern, report.block) for report in reports}
    dtype = str(model.dtype).removeprefix("torch.")
    attach_(model, Description(pattern, dtype, layers, config.to_dict()))
    if any(report.decoder_block is None for report in reports):
        model.config.tie_word_embeddings = False
