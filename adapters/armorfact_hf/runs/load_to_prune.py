"""Load a model to prune it: into memory if there is room for it and for the work, else open it on disk."""

from __future__ import annotations

from pathlib import Path

from armorfact_hf.data.calibration import Calibration
from armorfact_hf.data.load_model import Loaded, device_of, load_model, open_model
from armorfact_hf.data.own_text import SELF, WRITING
from armorfact_hf.free_memory import available
from armorfact_hf.model.on_disk import NotStreamable
from armorfact_hf.model.structure import Select
from armorfact_hf.observer import Observer
from armorfact_hf.pruning.config import PruneConfig
from armorfact_hf.pruning.job import Job, make_job
from armorfact_hf.pruning.memory import memory_of, model_bytes
from armorfact_hf.pruning.workers.choice import Choice, count_here
from armorfact_hf.pruning.workers.cluster_memory import cluster_memory

SURE_TO_FIT = 1 / 8  # of the memory that is free: a model of fewer bytes fits with all that is made of it


def load_to_prune(
    model: str,
    config: PruneConfig | None,
    calibration: Calibration,
    *,
    stream: bool | None = None,
    dtype: str = "auto",
    device: str | None = None,
    observer: Observer,
    states: str = "auto",
    workers: Choice = None,
) -> Loaded:
    """The model of that name, for `prune_to_folder`.

    Args:
        model, dtype, device: see `load_model`.
        config, calibration, states, workers: what memory goes by.
        stream: True opens it on disk, False loads it into memory. None does what there is memory for; a name on the hub
            is loaded then, and so is a model that writes its own text.

    Raises:
        NotStreamable: ``stream`` is True, and the model can only be loaded as a whole.
        ValueError: see `load_model` and `Calibration.check`.
    """
    calibration.check()
    if stream is None and (SELF in calibration.texts or not _large(model, device, workers)):
        stream = False  # a model on disk writes no text
    if stream is False:
        return load_model(model, dtype, device, observer.say)
    try:
        opened = open_model(model, dtype, device, observer.say)
        if stream or not _fits(job_of(opened, config, calibration, observer, states=states), observer, workers):
            return opened
    except NotStreamable:
        if stream:
            raise
    return load_model(model, dtype, device, observer.say)


def job_of(
    loaded: Loaded,
    config: PruneConfig | None,
    calibration: Calibration,
    observer: Observer,
    select: Select | None = None,
    states: str = "auto",
) -> Job:
    """The job of pruning a loaded model; see `make_job`."""
    tokens = calibration.tokens(loaded, observer.say, observer.counts(WRITING))
    return make_job(loaded.model, tokens, config, select, weights=loaded.weights, states=states)


def fits_whole(loaded: Loaded) -> bool:
    """Whether there is room for all weights of a model in memory."""
    needed = sum(parameter.nbytes for parameter in loaded.model.parameters())
    return loaded.weights is None or needed < available(loaded.weights.device)


def _large(model: str, device: str | None, workers: Choice) -> bool:
    place = device_of(device)
    copies = 1 if workers is None else 1 + (count_here(workers, place) or 1)
    folder = Path(model)
    stored = sum(path.stat().st_size for path in folder.glob("*.safetensors")) if model and folder.is_dir() else 0
    return copies * stored > SURE_TO_FIT * available(place)


def _fits(job: Job, observer: Observer, workers: Choice) -> bool:
    """Whether a job on a model on disk would fit into memory with all of the model there."""
    device, free = job.weights.device, available(job.weights.device)
    if workers is None:
        needed = memory_of(job, streamed=False, spilled=job.spills(free - model_bytes(job))).peak
    else:
        needed = cluster_memory(job, count_here(workers, device), streamed=False).peak
    if needed > free:
        observer.say(
            f"In memory this would take {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free: decoder blocks are read "
            "from disk one at a time."
        )
    return needed <= free
