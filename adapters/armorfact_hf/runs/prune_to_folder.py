"""From the name of a model to a finished folder: the checkpoint and the report of what was done."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import armorfact
from armorfact_hf.data.calibration import Calibration
from armorfact_hf.data.load_model import Loaded
from armorfact_hf.data.origin import origin_of
from armorfact_hf.files import check_room
from armorfact_hf.free_memory import peak_memory
from armorfact_hf.layers.format import dtype_name
from armorfact_hf.model.structure import Select
from armorfact_hf.observer import Observer
from armorfact_hf.pruning.config import PruneConfig
from armorfact_hf.pruning.job import Job
from armorfact_hf.pruning.plan import Plan, plan_job, planned_layers, timed
from armorfact_hf.pruning.prune import PruneReport, prune_job_
from armorfact_hf.pruning.resume.journal import Journal, only_writer
from armorfact_hf.pruning.resume.manifest import MANIFEST, check_same, read_manifest
from armorfact_hf.pruning.workers.choice import Choice, check_workers
from armorfact_hf.report.record import CalibrationFacts, ModelFacts, Report, Totals
from armorfact_hf.runs.finish import finish, found_finished, journal_of, refuse_unfinished
from armorfact_hf.runs.load_to_prune import job_of, load_to_prune


def prune_to_folder(
    model: Path | str | Loaded,
    out: Path | str,
    config: PruneConfig | None = None,
    calibration: Calibration | None = None,
    *,
    dtype: str = "auto",
    device: str | None = None,
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
        dtype, device: see `load_model`; of a model given by name.
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
    observer, calibration, out = observer or Observer(), calibration or Calibration(), Path(out)
    refuse_unfinished(out)
    check_workers(workers)
    if isinstance(model, Loaded):
        if (dtype, device, stream) != ("auto", None, None):
            raise ValueError("dtype, device and stream would not act on a model that is loaded: name it instead")
        loaded = model
    else:
        loaded = load_to_prune(
            str(model),
            config,
            calibration,
            stream=stream,
            dtype=dtype,
            device=device,
            observer=observer,
            states=states,
            workers=workers,
        )
    job = checked_job(loaded, out, config, calibration, observer, select, states, workers)
    if out.exists():
        return found_finished(out, loaded.tokenizer, job.manifest, observer)
    plan = plan_job(job, measure=False, workers=workers)
    check_room(out, plan.disk_bytes, begun=journal_of(out))
    facts = _model_facts(loaded, job)
    with only_writer(journal_of(out)):
        if out.exists():  # by another process that was at it a moment ago
            return found_finished(out, loaded.tokenizer, job.manifest, observer)
        observer.plan(timed(plan, job) if observer.wants_plan else plan)  # which may take a while, or be the end
        with Journal.open(journal_of(out), job.manifest, job.config.pattern) as journal:
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
    refuse_unfinished(out)
    job = job_of(loaded, config, calibration, observer, select, states)
    check_workers(workers, job)
    if out.exists():
        check_same(Report.read(out).manifest, job.manifest, out)
    elif ((begun := journal_of(out)) / MANIFEST).exists():
        check_same(read_manifest(begun), job.manifest, begun)
    return job


def _model_facts(loaded: Loaded, job: Job) -> ModelFacts:
    parameters = list(loaded.model.parameters())
    return ModelFacts(
        name=loaded.name,
        architecture=type(loaded.model).__name__,
        dtype=dtype_name(loaded.model.dtype),
        parameters=sum(parameter.numel() for parameter in parameters),
        bytes=sum(parameter.nbytes for parameter in parameters),
        fingerprint=job.fingerprint,
        origin=origin_of(loaded.name),
    )


def _report(facts: ModelFacts, calibration: Calibration, job: Job, done: PruneReport, plan: Plan) -> Report:
    count, length = job.tokens.shape
    pruned = {layer.name for layer in done.layers}  # all but those that no token reached
    found = replace(plan, layers=planned_layers((x for x in job.layers if x.name in pruned), job.config))
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
