"""A job on its way to another process.

Of a model in memory, all of it travels. A model on disk is opened anew by whoever receives the job: nothing of it
travels, and no process holds more of it than the decoder block that it is at.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from platform import node
from typing import Any

from armorfact_hf.model.on_disk import OnDisk
from armorfact_hf.model.structure import decoder_blocks
from armorfact_hf.pruning.fitting import fitting_layers
from armorfact_hf.pruning.job import Job

OF_THE_MODEL = ("model", "weights", "blocks", "layers")


def sent(job: Job) -> Callable[[], Job]:
    """What makes the job, wherever it is called; a ValueError says that a file of a model on disk is not there."""
    if not isinstance(job.weights, OnDisk):
        return partial(_held, job)
    facts = {field.name: getattr(job, field.name) for field in fields(job) if field.name not in OF_THE_MODEL}
    return partial(_reopened, job.weights.files, job.weights.reopen, {x.name: x.block for x in job.layers}, facts)


def _held(job: Job) -> Job:
    job.model.eval()
    return job


def _reopened(
    files: Collection[Path],
    again: Callable[[], OnDisk],
    chosen: Mapping[str, tuple[int, int] | None],
    facts: Mapping[str, Any],
) -> Job:
    if missing := [path for path in files if not path.is_file()]:
        raise ValueError(
            f"{missing[0]} is not there on {node()}: every machine has to see the folder of the model under that path"
        )
    weights = again()
    _, blocks = decoder_blocks(weights.model)
    layers, _ = fitting_layers(weights.model, facts["config"], lambda name, _: name in chosen)
    sized = tuple(replace(layer, block=chosen[layer.name]) for layer in layers)  # prices may have chosen others
    return Job(model=weights.model, weights=weights, blocks=tuple(blocks), layers=sized, **facts)
