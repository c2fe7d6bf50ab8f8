"""Recover a pruned model in memory: distil its dense model into the factors of all its pruned layers at once."""

from __future__ import annotations

import math
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import armorfact
from armorfact_hf.data.tokens import spread
from armorfact_hf.layers.linear import FactorizedLinear
from armorfact_hf.observer import Observer, Step
from armorfact_hf.pruning.checks import checked_tokens
from armorfact_hf.pruning.journal import Journal, flat_manifest, model_fingerprint, tokens_fingerprint
from armorfact_hf.recovery.adam import Adam
from armorfact_hf.recovery.divergence import Divergence
from armorfact_hf.recovery.factors import TrainedFactors, trained_factors
from armorfact_hf.recovery.report import Recovery
from armorfact_hf.recovery.settings import KEPT_ASIDE, TRAINED, RecoverySettings
from armorfact_hf.recovery.state import Progress, read_state_, write_state

MOST_NORM = 1.0  # of the gradient; a longer one is cut down to it
MOST_HALVINGS = 8  # of the rate, after which the run ends


def recover_(
    model: nn.Module,
    calibration: Any,
    teacher: nn.Module,
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
        teacher: the dense model, or any other with the same vocabulary, on any device; bfloat16 is enough.
        settings: `RecoverySettings()` by default.
        state: folder in which the run is kept every ``save_every`` steps. Called again with the same arguments on the
            same pruned model, after a run that was killed, `recover_` continues from there, and ends with the same bits
            on the same machine with as many threads.
        observer: told of every step.

    Returns:
        The report; both models are left in evaluation mode.

    Raises:
        ValueError: tokens that are no matrix of numbers in the vocabulary or fewer than two windows, a model without
            pruned layers or without gradients, a teacher that is pruned or has another vocabulary, NaN or infinite
            logits before the first step.
        DifferentRun: the folder belongs to other arguments. InUse: another process writes to it. DiskFull: in mid-run.
    """
    settings, observer = settings or RecoverySettings(), observer or Observer()
    tokens = checked_tokens(model, calibration)
    _check_windows(tokens)
    _check_models(model, teacher, settings)
    model.eval()
    teacher.eval()
    with (
        _opened(state, model, teacher, tokens, settings) as journal,
        trained_factors(model, TRAINED[settings.train]) as factors,
        torch.enable_grad(),
    ):
        divergence = Divergence(model, teacher, settings.gradient_checkpointing)
        return _Run(tokens, settings, divergence, factors, journal, save_every, observer).to_the_end()


def kept_aside(windows: int) -> list[int]:
    """The windows that measure and do not train: one in eight and at most eight, one of fewer than eight."""
    return spread(range(min(KEPT_ASIDE, windows) - 1, windows, KEPT_ASIDE), KEPT_ASIDE)


def _check_windows(tokens: Tensor) -> None:
    if len(tokens) < 2:
        raise ValueError("recovery needs two windows of text or more, one to train on and one to measure: got 1")


def _check_models(model: nn.Module, teacher: nn.Module, settings: RecoverySettings) -> None:
    layers = [module for module in model.modules() if isinstance(module, FactorizedLinear)]
    if not layers:
        raise ValueError("the model holds no pruned layer: prune it first, or load a folder that is pruned")
    if settings.train == "wrappers" and all(layer.left is None for layer in layers):
        raise ValueError("no pruned layer has wrappers, which train='wrappers' asks for: take train='factors'")
    if any(isinstance(module, FactorizedLinear) for module in teacher.modules()):
        raise ValueError("the teacher is pruned: give the dense model, loaded beside the pruned one")
    sizes = [x.get_input_embeddings().num_embeddings for x in (model, teacher)]
    if sizes[0] != sizes[1]:
        raise ValueError(f"expected a teacher with the model's vocabulary of {sizes[0]}, got one of {sizes[1]}")
    if torch.is_inference_mode_enabled() or any(x.is_meta or x.is_inference() for x in model.parameters()):
        raise ValueError(
            "no gradients can be had of this model: tensors of it are on the meta device (offloaded), or were made in "
            "torch.inference_mode; load it whole onto one device, `load_pruned(folder, device)`, outside of that mode"
        )


def _opened(
    state: Path | str | None, model: nn.Module, teacher: nn.Module, tokens: Tensor, settings: RecoverySettings
) -> AbstractContextManager[Journal | None]:
    if state is None:
        return nullcontext()
    pattern = next(module.pattern for module in model.modules() if isinstance(module, FactorizedLinear))
    return Journal.open(Path(state), manifest_of(model, teacher, tokens, settings), pattern)


def manifest_of(model: nn.Module, teacher: nn.Module, tokens: Tensor, settings: RecoverySettings) -> dict[str, Any]:
    """What the bits of the result depend on, machine and threads left out."""
    return flat_manifest(
        settings.to_dict(),
        armorfact=armorfact.__version__,
        pruned=model_fingerprint(model),
        teacher=model_fingerprint(teacher),
        calibration=tokens_fingerprint(tokens),
    )


class _Run:
    """The steps of one recovery."""

    def __init__(
        self,
        tokens: Tensor,
        settings: RecoverySettings,
        divergence: Divergence,
        factors: TrainedFactors,
        journal: Journal | None,
        save_every: int,
        observer: Observer,
    ) -> None:
        self.settings, self.divergence, self.factors = settings, divergence, factors
        self.journal, self.save_every, self.observer = journal, save_every, observer
        aside = kept_aside(len(tokens))
        self.aside = [tokens[window] for window in aside]
        self.training = [tokens[window] for window in range(len(tokens)) if window not in aside]
        self.steps = len(self.training) if settings.steps is None else settings.steps
        self.adam = Adam(factors.parameters)
        self.progress = Progress()

    def to_the_end(self) -> Recovery:
        start = time.perf_counter()
        self._resume()
        earlier = self.progress.seconds
        if not self.progress.history:
            self._measure_start()
        while self.progress.step < self.steps and len(self.progress.notes) <= MOST_HALVINGS:
            self._tell()
            self._take_step()
            done, last = self.progress.step, self.progress.step == self.steps
            if last or not done % self.settings.measure_every:
                self._measure()
            self.progress.seconds = earlier + time.perf_counter() - start
            if last or not done % self.save_every:
                self._save()
        if self.progress.history[-1][0] != self.progress.step:  # it ended early
            self._measure()
        self._tell()
        return self._report(earlier + time.perf_counter() - start)

    def _take_step(self) -> None:
        """One step, or the one before taken back if this one's loss or gradient is not finite."""
        self.factors.train_()
        self.adam.zero_gradients_()
        found = self.divergence.backward(self._window(self.progress.step))
        norm = nn.utils.clip_grad_norm_(self.factors.parameters.values(), MOST_NORM)
        if math.isfinite(found) and math.isfinite(norm):
            self.adam.step_(self.progress.factor * self.settings.rate_at(self.progress.step, self.steps))
        else:
            self.adam.undo_()
            self.progress.factor /= 2
            self._note(
                f"step {self.progress.step + 1}: loss or gradient was not finite; the step before was taken back, and "
                "the rate halved"
            )
        self.progress.step += 1

    def _window(self, step: int) -> Tensor:
        """Every pass over the windows has an order of its own, drawn from the seed."""
        passes, place = divmod(step, len(self.training))
        generator = torch.Generator().manual_seed(self.settings.seed + passes)
        return self.training[int(torch.randperm(len(self.training), generator=generator)[place])]

    def _measure(self) -> float:
        """The divergence on the windows kept aside, of the factors as they would be stored; the best are kept."""
        self.factors.store_()
        found = sum(map(self.divergence.of, self.aside)) / len(self.aside)
        found = found if math.isfinite(found) else math.inf
        if self.progress.history and found < self.progress.best[1]:
            self.factors.keep_()
        self.progress.history.append((self.progress.step, found))
        return found

    def _measure_start(self) -> None:
        if self._measure() == math.inf:
            raise ValueError(
                "the pruned model or its teacher has NaN or infinite logits on the windows kept aside, before any "
                "step: see with `armorfact eval` which of them, and load or prune it again"
            )

    def _tensors(self) -> dict[str, Tensor]:
        """All that a run needs to go on."""
        groups = {"factor": self.factors.parameters, "best": self.factors.best}
        named = {f"{group}.{name}": tensor.detach() for group, held in groups.items() for name, tensor in held.items()}
        return named | self.adam.tensors

    def _save(self) -> None:
        self.progress.count, self.progress.last_rate = self.adam.count, self.adam.last_rate
        if self.journal is not None:
            write_state(self.journal, self._tensors(), self.progress)

    def _resume(self) -> None:
        found = None if self.journal is None else read_state_(self.journal, self._tensors())
        if found is not None:
            self.progress = found
            self.adam.count, self.adam.last_rate = found.count, found.last_rate
            self.observer.say(f"Continuing after step {found.step} of {self.steps}.")

    def _note(self, sentence: str) -> None:
        self.progress.notes.append(sentence)
        self.observer.say(sentence)

    def _tell(self) -> None:
        best = self.progress.best[1]
        self.observer.step(Step(self.progress.step, self.steps, f"distilling, {best:.4f} nats a token from dense"))

    def _report(self, seconds: float) -> Recovery:
        best_step, after = self.progress.best
        return Recovery(
            settings=self.settings,
            windows=len(self.training),
            kept_aside=len(self.aside),
            steps=self.progress.step,
            tokens=self.progress.step * len(self.aside[0]),
            before=self.progress.history[0][1],
            after=after,
            best_step=best_step,
            history=tuple(pair for pair in self.progress.history if pair[1] < math.inf),
            seconds=seconds,
            notes=tuple(self.progress.notes),
        )
