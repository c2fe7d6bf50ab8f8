"""Prune a model in memory, one decoder block after another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import gettempdir
from typing import Any

from torch import nn

from armorfact import Pattern
from armorfact_hf.checkpoint.description import Description
from armorfact_hf.checkpoint.quantizer import attach_
from armorfact_hf.files import workshop
from armorfact_hf.layers.format import LayerFormat, dtype_name
from armorfact_hf.model.experts import stack_experts_
from armorfact_hf.model.structure import DenseLayer, Select
from armorfact_hf.observer import Observer
from armorfact_hf.pruning.block_by_block import BlockByBlock, units
from armorfact_hf.pruning.budget import shared_out
from armorfact_hf.pruning.config import PruneConfig
from armorfact_hf.pruning.job import Job, make_job
from armorfact_hf.pruning.layer import LayerReport, mean_loss
from armorfact_hf.pruning.notes import damping_noted
from armorfact_hf.pruning.prices import prices
from armorfact_hf.pruning.progress import Clock, Progress
from armorfact_hf.pruning.resume.entry import Finished
from armorfact_hf.pruning.resume.journal import PRICES, Journal
from armorfact_hf.pruning.tuning.matching import BlockReport
from armorfact_hf.pruning.workers.choice import Choice, check_workers, hired


@dataclass(frozen=True)
class PruneReport:
    """What `prune_` did.

    Args:
        config: the settings.
        layers: a report for each pruned layer, in the order of the model.
        dense_layers: what stayed dense, and why.
        seconds: wall time, that of the finished blocks which a resumed run found included.
        blocks: how each decoder block was tuned, where they were.
    """

    config: PruneConfig
    layers: tuple[LayerReport, ...]
    dense_layers: tuple[DenseLayer, ...]
    seconds: float
    blocks: tuple[BlockReport, ...] = ()

    def mean_loss(self, method: str | None = None) -> float:
        """`armorfact_hf.pruning.layer.mean_loss` of the method of this run, or of a baseline in its report."""
        return mean_loss(self.layers, method or self.config.method)


def prune_(
    model: nn.Module,
    calibration: Any,
    config: PruneConfig | None = None,
    *,
    select: Select | None = None,
    journal: Path | str | None = None,
    observer: Observer | None = None,
    states: str = "auto",
    workers: Choice = None,
    experts_at_once: int | None = None,
) -> PruneReport:
    """Replace linear layers of a causal language model by `FactorizedLinear`, block by block, in place.

    Args:
        model: of transformers, on any device. Its config is given the description that `load_pruned` reads.
        calibration: (windows, length) integer token numbers.
        config: what to prune and how; `PruneConfig()` by default.
        select: called with name and module of each layer that the config lets through; keeps it if true.
        journal: folder in which every finished block is kept, and every finished layer of the block at work. Called
            again with the same arguments on the same dense model, after a run that was killed, `prune_` continues from
            there and ends with the same weights.
        observer: is told of every unit of work.
        states: where the hidden states of the calibration windows wait between blocks: "memory", "disk" (in the
            journal, or a temporary folder), or "auto", which is the disk if they would take more than a quarter of the
            memory that is free. The weights come out the same.
        workers: who does the work: None is this process, a number is so many others of this machine, "ray" is the
            cluster at RAY_ADDRESS. The weights do not depend on it. What waits is in Ray's object store then, so that
            ``states`` has to be "auto" and ``experts_at_once`` None.
        experts_at_once: how many experts of a module have the second moments of their inputs in memory at a time; more
            passes over the calibration tokens, and the same weights. None is all of them if memory holds that.

    Returns:
        The reports; the model is left in evaluation mode.

    Raises:
        ValueError: tokens that are not a matrix of numbers in the vocabulary, a model that is pruned already,
            holds NaN, or cannot be run on tokens alone, settings that leave nothing to prune, workers that are none;
            all before any work. ImportError: workers need Ray, and it is not installed.
        DifferentRun: the journal belongs to other arguments. InUse: another process is writing it.
        DiskFull: in mid-run; what is finished stays in the journal.
        NonFiniteActivations: a module computes NaN or infinite values; nothing is changed from its block on.

    >>> import torch, transformers
    >>> sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    >>> model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=32, **sizes))
    >>> report = prune_(model, torch.arange(64).reshape(4, 16) % 32, PruneConfig(sweeps=1))
    >>> len(report.layers), report.mean_loss() < report.mean_loss("wanda")
    (7, True)
    >>> model.model.layers[0].mlp.up_proj
    FactorizedLinear(in_features=16, out_features=32, bias=False, pattern=2:4, block=(4, 4))
    """
    check_workers(workers)
    observer = observer or Observer()
    job = make_job(model, calibration, config, select, states=states, experts_at_once=experts_at_once)
    check_workers(workers, job)
    if journal is None:
        return prune_job_(job, None, observer, workers)
    with Journal.open(Path(journal), job.manifest, job.config.pattern) as stored:
        return prune_job_(job, stored, observer, workers)


def prune_job_(job: Job, journal: Journal | None, observer: Observer, workers: Choice = None) -> PruneReport:
    """`prune_`, for arguments that were checked."""
    job.model.eval()
    progress, clock = Progress(observer, units(job)), Clock()
    with damping_noted(), _folder_of_states(job, journal) as folder:
        _share_blocks_out(job, journal, progress, clock, folder)
        with hired(workers, job, progress, folder) as those:
            run = BlockByBlock(job, journal, those, progress, clock, folder=None if workers else folder)
            reports = run.reports()
    stack_experts_(job.model)
    job.model.eval()  # what came into it since was made for training, as all modules are
    describe_(job, reports)
    pruned = {report.name for report in reports}
    missed = [DenseLayer(x.name, "no calibration token reached it") for x in job.layers if x.name not in pruned]
    dense_layers = (*job.dense_layers, *missed)
    return PruneReport(job.config, reports, dense_layers, run.clock.seconds(), tuple(run.blocks))


def _share_blocks_out(job: Job, journal: Journal | None, progress: Progress, clock: Clock, folder: Path | None) -> None:
    """Give the layers of a job the blocks that they get by their prices, where these are asked for."""
    if not job.priced:
        return
    found = None if journal is None else journal.read(PRICES)
    if found is None:
        found = Finished([], 0.0, prices=prices(job, progress, folder))
        if journal is not None:
            journal.write(PRICES, replace(found, seconds=clock.lap()))
    else:
        clock.earlier += found.seconds
        progress.tell(job.pricing_steps, "prices of layers are found already")
    job.take(shared_out(job.layers, found.prices or {}, job.config))


@contextmanager
def _folder_of_states(job: Job, journal: Journal | None) -> Iterator[Path | None]:
    """Where states wait on disk, if they do; a folder that goes in the end."""
    if not job.spilled:
        yield None
        return
    with workshop(Path(gettempdir()) if journal is None else journal.folder, "states") as folder:
        folder.mkdir()
        yield folder


def describe_(job: Job, reports: Sequence[LayerReport]) -> None:
    """Write into the model's config what its pruned layers are, so that transformers saves and loads them."""
    model, pattern = job.model, Pattern.parse(job.config.pattern)
    places = {layer.name: layer.stored_in for layer in job.layers}
    layers: dict[str, LayerFormat] = {}
    whole = job.config.core_dtype, job.config.wrapper_dtype
    for report in reports:
        name, experts = places[report.name]
        layers[name] = LayerFormat(name, report.shape, pattern, report.block, experts, *whole)
    dtype = dtype_name(model.dtype)
    attach_(model, Description(pattern, dtype, layers, job.config.to_dict()))
    if any(report.decoder_block is None for report in reports):
        model.config.tie_word_embeddings = False
