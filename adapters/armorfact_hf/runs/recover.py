"""From a pruned folder to a recovered one: the same checkpoint with better factors, and the report of both."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from armorfact_hf.checkpoint.folder import describe_folder
from armorfact_hf.data.calibration import EVERYTHING, Calibration
from armorfact_hf.data.load_model import load_model
from armorfact_hf.files import check_room
from armorfact_hf.free_memory import available
from armorfact_hf.layers.stack import pruned_modules
from armorfact_hf.observer import Observer
from armorfact_hf.pruning.resume.journal import Journal
from armorfact_hf.recovery.recover import AnyTeacher, check_save_every, checked_request, distil_, manifest_of
from armorfact_hf.recovery.settings import TRAINED, RecoverySettings
from armorfact_hf.recovery.stored_teacher import StoredTeacher
from armorfact_hf.report.record import Report
from armorfact_hf.runs.evaluate import dense_model
from armorfact_hf.runs.finish import finish, found_finished, journal_of, refuse_unfinished


def recover_to_folder(
    folder: Path | str,
    out: Path | str,
    settings: RecoverySettings | None = None,
    calibration: Calibration = EVERYTHING,
    *,
    teacher: Path | str | None = None,
    device: str | None = None,
    save_every: int = 10,
    observer: Observer | None = None,
) -> Report:
    """Recover the pruned model of a finished folder, and write another one: checkpoint, tokenizer, report.

    The run stands in the folder ``<out>.journal`` until ``out`` is whole, so the same call continues one that was
    killed; where ``out`` is the finished work of the same call, its report is returned at once.

    Args:
        folder: what `prune_to_folder` wrote. out: the folder to write.
        settings: see `recover_`. calibration: the text to learn from, all of the demo's by default.
        teacher: a name for `load_model`; by default the dense model that ``folder`` was pruned from. It computes in
            bfloat16. Or a folder that `teach_to_folder` wrote of one.
        device: see `load_model`. save_every, observer: see `recover_`.

    Returns:
        The report, which is in the folder too: that of ``folder``, with what recovery did, and without perplexities
        and tasks, which have to be measured anew.

    Raises:
        NotPruned: ``folder`` holds no pruned model.
        ValueError, OSError: bad arguments, a dense model that changed, too little room on disk, an ``out`` that holds
            something else; all found before the work starts. InUse: another process writes the same folder. DiskFull:
            in mid-run; what was kept last is still there.
    """
    settings, observer = settings or RecoverySettings(), observer or Observer()
    folder, out, teacher = Path(folder), Path(out), None if teacher is None else str(teacher)
    check_save_every(save_every)
    calibration.check(own=False)
    refuse_unfinished(out)
    if out.resolve() == folder.resolve():
        raise ValueError(f"{out} is the folder to recover: name another one to write")
    describe_folder(folder)
    report = Report.read(folder)
    loaded = load_model(str(folder), device=device, log=observer.say)
    if not out.exists():
        _check_memory(loaded.model, settings, teacher)
    dense = _teacher(report, teacher, device, observer)
    tokens = checked_request(loaded.model, calibration.tokens(loaded, observer.say), dense, settings)
    manifest = manifest_of(loaded.model, dense, tokens, settings)
    if out.exists():
        return found_finished(out, loaded.tokenizer, manifest, observer)
    check_room(out, _needed(loaded.model), begun=journal_of(out))
    with Journal.open(journal_of(out), manifest, describe_folder(folder).pattern) as journal:
        if out.exists():  # by another process that was at it a moment ago
            return found_finished(out, loaded.tokenizer, manifest, observer)
        done = distil_(loaded.model, tokens, dense, settings, journal, save_every, observer)
        report = replace(
            report, manifest=manifest, evaluations=(), tasks=(), recovery=replace(done, teacher=_shown(teacher))
        )
        finish(loaded, report, out, journal)
    return report


@torch.no_grad()
def _teacher(report: Report, name: str | None, device: str | None, observer: Observer) -> AnyTeacher:
    """The dense model, its weights in bfloat16: its buffers, such as frequencies of positions, stay as they are."""
    if name is not None and StoredTeacher.found_in(name):
        return StoredTeacher(name)
    if name is not None:
        return load_model(name, "bfloat16", device, observer.say).model
    model = dense_model(report, device, observer.say).model
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    return model


def _check_memory(model: Any, settings: RecoverySettings, teacher: str | None) -> None:
    """Raise ValueError if there is no room beside the pruned model for what a recovery holds from beginning to end.

    That is the dense model, a copy of every factor to train, and of each trained number its gradient, its momentum, the
    one before and the best. What the blocks keep of a window comes on top.
    """
    layers = pruned_modules(model).values()
    needed = sum(_trained_bytes(tensor) for layer in layers for tensor in (*layer.parameters(), *layer.buffers()))
    parts = [getattr(layer, name) for layer in layers for name in TRAINED[settings.train]]
    needed += sum(part.nbytes + 3 * _trained_bytes(part) for part in parts if part is not None)
    ways = "train wrappers alone (--train wrappers)"
    if teacher is None or not StoredTeacher.found_in(teacher):
        needed += torch.bfloat16.itemsize * _dense_numbers(model, layers)
        ways += ", or let `armorfact teach` write the dense model's words down and name their folder (--teacher)"
    free = available(model.device)
    if needed > free:
        raise ValueError(
            f"recovery takes {needed / 1e9:.1f} GB beside the pruned model, and {free / 1e9:.1f} GB are free: {ways}"
        )


def _trained_bytes(tensor: torch.Tensor) -> int:
    """Of a tensor in float32 or more; whole numbers stay."""
    return tensor.numel() * (max(tensor.itemsize, 4) if tensor.is_floating_point() else tensor.itemsize)


def _dense_numbers(model: Any, layers: Iterable[Any]) -> int:
    """How many numbers the dense model has."""
    factors = {parameter for layer in layers for parameter in layer.parameters()}
    others = sum(parameter.numel() for parameter in model.parameters() if parameter not in factors)
    return others + sum((layer.layout.experts or 1) * math.prod(layer.layout.shape) for layer in layers)


def _shown(teacher: str | None) -> str | None:
    """A teacher's name, of a folder without what it is in."""
    return Path(teacher).name if teacher is not None and Path(teacher).exists() else teacher


def _needed(model: nn.Module) -> int:
    """Bytes on disk: the state and the one that takes its place, then the finished folder."""
    layers = pruned_modules(model).values()
    tensors = [tensor for layer in layers for tensor in layer.parameters()]
    state = sum(tensor.nbytes + 3 * tensor.numel() * max(tensor.itemsize, 4) for tensor in tensors)
    return 2 * state + sum(tensor.nbytes for tensor in model.state_dict().values())
