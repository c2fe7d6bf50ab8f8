"""From the name of a model to a finished folder: the checkpoint and the report of what was done."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

import armorfact
from armorfact_hf.data.load_model import Loaded, Log
from armorfact_hf.data.origin import DEMO, origin_of
from armorfact_hf.data.texts import calibration_source, tokens_of
from armorfact_hf.data.tokens import spread, windows
from armorfact_hf.files import check_room
from armorfact_hf.model.structure import Select
from armorfact_hf.observer import Observer
from armorfact_hf.pruning.config import PruneConfig
from armorfact_hf.pruning.job import Job
from armorfact_hf.pruning.journal import Journal, remove_leftover
from armorfact_hf.pruning.manifest import DifferentRun, check_same
from armorfact_hf.pruning.plan import Plan, plan_job, planned_layers
from armorfact_hf.pruning.prune import PruneReport, prune_job_
from armorfact_hf.pruning.workers.choice import Choice, check_workers
from armorfact_hf.report.record import FILE, CalibrationFacts, ModelFacts, Report, Totals
from armorfact_hf.runs.finish import check_whole, finish
from armorfact_hf.runs.load_to_prune import job_of, load_to_prune


@dataclass(frozen=True)
class Calibration:
    """Which tokens statistics are gathered from.

    Args:
        text: a file of plain text, "demo:gensim-enwiki" or "demo:python"; or several, which share the windows evenly.
        windows: how many, spread evenly over each text, or None for all of it; length: tokens of each.
    """

    text: str | Sequence[str] = "demo:gensim-enwiki"
    windows: int | None = 16
    length: int = 2048

    @property
    def texts(self) -> list[str]:
        """Those of ``text``."""
        return [self.text] if isinstance(self.text, str) else list(self.text)

    @property
    def names(self) -> str:
        """Of the texts, without their folders."""
        return ", ".join(Path(text.removeprefix(DEMO)).name for text in self.texts)

    def tokens(self, loaded: Loaded, log: Log) -> torch.Tensor:
        """(windows, length) int64; a bos heads every window if the tokenizer puts it before texts.

        Raises:
            ValueError: no text, too few tokens in one of them, or fewer windows than texts.
        """
        texts, length = self.texts, loaded.window(self.length)
        if not texts or (self.windows is not None and self.windows < len(texts)):
            raise ValueError(f"expected one text or more, and a window for each, got {len(texts)} and {self.windows}")
        found = []
        for place, name in enumerate(texts):
            tokens, count = tokens_of(calibration_source(name, log), loaded), self._share(place)
            windows(tokens, length, count, bos=loaded.bos)  # raises if there are too few tokens
            found += spread(windows(tokens, length, bos=loaded.bos), count)
        return torch.from_numpy(np.stack(found))

    def _share(self, place: int) -> int | None:
        """How many windows the text at a place has."""
        if self.windows is None:
            return None
        first, end = (at * self.windows // len(self.texts) for at in (place, place + 1))
        return end - first


def prune_to_folder(
    model: str | Loaded,
    out: Path,
    config: PruneConfig | None = None,
    calibration: Calibration | None = None,
    *,
    observer: Observer | None = None,
    select: Select | None = None,
    stream: bool | None = None,
    states: str = "auto",
    workers: Choice = None,
) -> Report:
    """Prune a model and write the finished folder: checkpoint, tokenizer, `report.json`, `report.html`.

    Finished blocks stand in the folder ``<out>.journal`` until ``out`` is whole, so the same call continues a run that
    was killed; where ``out`` is the finished work of the same call, its report is returned at once.

    Args:
        model: a name for `load_model`, or a loaded dense model, which is pruned in place.
        out: the folder to write.
        config, calibration: what to prune and how, and on which tokens.
        observer: is told of slow steps, of the plan, and of every unit of work; it prints sentences by default.
        select, states, workers: see `prune_`.
        stream: for a model given by name, whether its decoder blocks are read from disk one at a time; None is where
            the model and the work on it would not fit into the memory that is free. The files come out the same.

    Returns:
        The report, which is in the folder too.

    Raises:
        ValueError, OSError: bad arguments, too little room on disk, an ``out`` that holds something else; all found
            before the work starts. InUse: another process writes the same folder. ImportError: workers of Ray,
            and no Ray. DiskFull, NonFiniteActivations: in mid-run; what is finished is kept.
    """
    observer, calibration = observer or Observer(), calibration or Calibration()
    _refuse_foreign(out)
    check_workers(workers)
    loaded = model
    if isinstance(loaded, str):
        loaded = load_to_prune(
            loaded, config, calibration, stream=stream, observer=observer, states=states, workers=workers
        )
    job = checked_job(loaded, out, config, calibration, observer, select, states, workers)
    if out.exists():
        return _found_finished(out, loaded, job, observer)
    plan = plan_job(job, measure=observer.wants_plan, workers=workers)
    observer.plan(plan)
    check_room(out, plan.disk_bytes, begun=_journal(out))
    facts = _model_facts(loaded, job)
    with Journal.open(_journal(out), job.manifest, job.config.pattern) as journal:
        if out.exists():  # by another process that was at it a moment ago
            return _found_finished(out, loaded, job, observer)
        report = _report(facts, calibration, job, prune_job_(job, journal, observer, workers), plan)
        finish(loaded, report, out, journal)
    return report


def checked_job(
    loaded: Loaded,
    out: Path,
    config: PruneConfig | None,
    calibration: Calibration,
    observer: Observer,
    select: Select | None,
    states: str,
    workers: Choice,
) -> Job:
    """The job of pruning a loaded model into a folder, unless something speaks against it; the arguments are those of
    `prune_to_folder`.

    Raises:
        ValueError, ImportError: bad arguments. DifferentRun: ``out`` holds something else.
    """
    _refuse_foreign(out)
    job = job_of(loaded, config, calibration, observer, select, states)
    check_workers(workers, job)
    if out.exists():
        check_same(Report.read(out).manifest, job.manifest, out)
    return job


def _refuse_foreign(out: Path) -> None:
    if out.exists() and not (out / FILE).exists():
        raise DifferentRun(f"{out} exists and is no folder that armorfact finished: name another, or remove it")


def _journal(out: Path) -> Path:
    return out.with_name(f"{out.name}.journal")


def _found_finished(out: Path, loaded: Loaded, job: Job, observer: Observer) -> Report:
    """The report of a finished folder, which has to be this job's, and whole."""
    report = Report.read(out)
    check_same(report.manifest, job.manifest, out)
    check_whole(out, loaded.tokenizer)
    remove_leftover(_journal(out), job.manifest)
    observer.say(f"{out} is finished already.")
    return report


def _model_facts(loaded: Loaded, job: Job) -> ModelFacts:
    parameters = list(loaded.model.parameters())
    return ModelFacts(
        name=loaded.name,
        architecture=type(loaded.model).__name__,
        dtype=str(loaded.model.dtype).removeprefix("torch."),
        parameters=sum(parameter.numel() for parameter in parameters),
        bytes=sum(parameter.nbytes for parameter in parameters),
        fingerprint=job.fingerprint,
        origin=origin_of(loaded.name),
    )


def _report(facts: ModelFacts, calibration: Calibration, job: Job, done: PruneReport, plan: Plan) -> Report:
    count, length = job.tokens.shape
    found = replace(plan, layers=planned_layers(job.layers, job.config))
    return Report(
        armorfact_version=armorfact.__version__,
        model=facts,
        calibration=CalibrationFacts(calibration.names, count, length, job.manifest["calibration"]),
        config=done.config,
        manifest=job.manifest,
        layers=done.layers,
        dense_layers=done.dense_layers,
        blocks=done.blocks,
        totals=Totals(found.dense_bytes, found.bytes, found.wrapper_overhead, done.seconds, peak_memory()),
    )


def peak_memory(process: int | str = "self") -> int:
    """The most memory that this process has held, in bytes; or, on Linux, another one by its number."""
    status = Path(f"/proc/{process}/status")
    if status.exists():  # what getrusage says there counts what the process was forked from
        [line] = (line for line in status.read_text(encoding="utf-8").splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        return psutil.Process().memory_info().peak_wset
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
