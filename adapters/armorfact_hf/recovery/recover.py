"""Recover a pruned model in memory: distil its dense model into the factors of all its pruned layers at once."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import armorfact
from armorfact_hf.checkpoint.fingerprint import config_fingerprint, model_fingerprint, tokens_fingerprint
from armorfact_hf.layers.stack import pruned_modules
from armorfact_hf.observer import Observer
from armorfact_hf.pruning.checks import checked_tokens
from armorfact_hf.pruning.resume.journal import Journal
from armorfact_hf.pruning.resume.manifest import flat_manifest
from armorfact_hf.recovery.divergence import Divergence
from armorfact_hf.recovery.factors import trained_factors
from armorfact_hf.recovery.report import Recovery
from armorfact_hf.recovery.run import Run
from armorfact_hf.recovery.settings import TRAINED, RecoverySettings
from armorfact_hf.recovery.stored_teacher import StoredTeacher, check_teacher
from armorfact_hf.recovery.trainable import refuse_integers

AnyTeacher = nn.Module | StoredTeacher


def recover_(
    model: nn.Module,
    calibration: Any,
    teacher: AnyTeacher,
    settings: RecoverySettings | None = None,
    *,
    state: Path | str | None = None,
    save_every: int = 10,
    observer: Observer | None = None,
) -> Recovery:
    r"""Minimize over the factors of all pruned layers of a model, supports fixed, in place:

    .. math:: \operatorname{mean}_t \; \mathrm{KL}(p_t \,\|\, q_t)

    with p what the dense model says at each position of the calibration text, q what the pruned one does. A step takes
    one window. The factors are trained in float32, products are in bfloat16; now and then they are rounded to the
    dtype that they are stored in, and measured on windows kept aside. The best of those states is the result, so that
    the divergence there never ends above where it began.

    Args:
        model: pruned, on any device; dense parts of it do not change.
        calibration: (windows, length) integer token numbers; one window in eight, at most 8, is kept aside.
        teacher: the dense model, or any other with the same vocabulary, on any device; bfloat16 is enough. Or what
            `store_teacher` left of one for these windows: then divergences are of its likeliest words, all others
            taken as one, and so are those of the report: lower bounds.
        settings: `RecoverySettings()` by default.
        state: folder in which the run is kept every ``save_every`` steps. Called again with the same arguments on the
            same pruned model, after a run that was killed, `recover_` continues from there, and ends with the same bits
            on the same machine with as many threads.
        observer: told of every step.

    Returns:
        The report; both models are left in evaluation mode.

    Raises:
        ValueError: a ``save_every`` below 1, tokens that are no matrix of numbers in the vocabulary, fewer than two
            windows, a model without pruned layers or without gradients, a teacher that is pruned or has another
            vocabulary, NaN or infinite logits before the first step.
        DifferentRun: the folder belongs to other arguments. InUse: another process writes to it. DiskFull: in mid-run.
    """
    settings, observer = settings or RecoverySettings(), observer or Observer()
    check_save_every(save_every)
    tokens = checked_request(model, calibration, teacher, settings)
    with _opened(state, model, teacher, tokens, settings) as journal:
        return distil_(model, tokens, teacher, settings, journal, save_every, observer)


def distil_(
    model: nn.Module,
    tokens: Tensor,
    teacher: AnyTeacher,
    settings: RecoverySettings,
    journal: Journal | None,
    save_every: int,
    observer: Observer,
) -> Recovery:
    """`recover_`, of what `checked_request` found right, in an open journal or in none."""
    model.eval()
    if isinstance(teacher, nn.Module):
        teacher.eval()
    with trained_factors(model, TRAINED[settings.train]) as factors, torch.enable_grad():
        divergence = Divergence(model, teacher, settings.gradient_checkpointing)
        done = Run(tokens, settings, divergence, factors, journal, save_every, observer).to_the_end()
    return replace(done, likeliest=teacher.likeliest) if isinstance(teacher, StoredTeacher) else done


def check_save_every(steps: int) -> None:
    """Raise ValueError if that is no number of steps."""
    if type(steps) is not int or steps < 1:
        raise ValueError(f"save_every must be a whole number of at least 1, got {steps!r}")


def checked_request(model: nn.Module, calibration: Any, teacher: AnyTeacher, settings: RecoverySettings) -> Tensor:
    """The calibration tokens of a recovery that can be done.

    Raises:
        ValueError: see `recover_`.
    """
    tokens = checked_tokens(model, calibration)
    if len(tokens) < 2:
        raise ValueError("recovery needs two windows of text or more, one to train on and one to measure: got 1")
    _check_models(model, teacher, settings)
    if isinstance(teacher, StoredTeacher):
        teacher.check(tokens)
    return tokens


def _check_models(model: Any, teacher: Any, settings: RecoverySettings) -> None:
    layers = pruned_modules(model).values()
    if not layers:
        raise ValueError("the model holds no pruned layer: prune it first, or load a folder that is pruned")
    if settings.train == "wrappers" and all(layer.left is None for layer in layers):
        raise ValueError("no pruned layer has wrappers, which train='wrappers' asks for: take train='factors'")
    refuse_integers(model, settings.train)
    if isinstance(teacher, nn.Module):
        check_teacher(teacher)
        if pruned_modules(teacher):
            raise ValueError("the teacher is pruned: give the dense model, loaded beside the pruned one")
    sizes = [_vocabulary(x) for x in (model, teacher)]
    if sizes[0] != sizes[1]:
        raise ValueError(f"expected a teacher with the model's vocabulary of {sizes[0]}, got one of {sizes[1]}")
    if torch.is_inference_mode_enabled() or any(x.is_meta or x.is_inference() for x in model.parameters()):
        raise ValueError(
            "no gradients can be had of this model: tensors of it are on the meta device (offloaded), or were made in "
            "torch.inference_mode; load it whole onto one device, `load_pruned(folder, device)`, outside of that mode"
        )


def _vocabulary(model: Any) -> int:
    return model.vocabulary if isinstance(model, StoredTeacher) else model.get_input_embeddings().num_embeddings


def _opened(
    state: Path | str | None, model: nn.Module, teacher: AnyTeacher, tokens: Tensor, settings: RecoverySettings
) -> AbstractContextManager[Journal | None]:
    if state is None:
        return nullcontext()
    pattern = next(iter(pruned_modules(model).values())).pattern
    return Journal.open(Path(state), manifest_of(model, teacher, tokens, settings), pattern)


def manifest_of(model: nn.Module, teacher: AnyTeacher, tokens: Tensor, settings: RecoverySettings) -> dict[str, Any]:
    """What the bits of the result depend on, machine and threads left out."""
    given = settings.to_dict()
    del given["gradient_checkpointing"]  # of memory and time alone: a run may go on with it, or without
    return flat_manifest(
        given,
        armorfact=armorfact.__version__,
        pruned=model_fingerprint(model),
        pruned_config=config_fingerprint(model),
        teacher=teacher.fingerprint if isinstance(teacher, StoredTeacher) else model_fingerprint(teacher),
        teacher_config=None if isinstance(teacher, StoredTeacher) else config_fingerprint(teacher),
        calibration=tokens_fingerprint(tokens),
    )
