"""The steps of one recovery: train, measure, keep the best, save, undo what is not finite."""

from __future__ import annotations

import math
import time

import torch
from torch import Tensor, nn

from armorfact_hf.data.tokens import spread
from armorfact_hf.observer import Observer, Step
from armorfact_hf.pruning import schedule
from armorfact_hf.pruning.resume.journal import Journal
from armorfact_hf.pruning.tuning.muon import Muon
from armorfact_hf.recovery.divergence import Divergence
from armorfact_hf.recovery.factors import TrainedFactors
from armorfact_hf.recovery.report import Recovery
from armorfact_hf.recovery.settings import RecoverySettings
from armorfact_hf.recovery.state import RunState, read_state_, write_state

MOST_ASIDE = 8  # windows that are measured on, each time
MOST_NORM = 1.0  # of the gradient; a longer one is cut down to it
MOST_HALVINGS = 8  # of the rate, after which the run ends


def kept_aside(windows: int) -> list[int]:
    """The windows that measure and do not train: one in eight and at most eight, one of fewer than eight."""
    return spread(schedule.kept_aside(windows), MOST_ASIDE)


class Run:
    """One recovery on its way.

    Args:
        tokens: (windows, length). settings: how.
        divergence: of the model that holds ``factors`` from its teacher.
        journal: where the state is kept every ``save_every`` steps, or None.
        observer: is told.
    """

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
        self.muon = Muon(factors.parameters)
        self.progress = RunState()

    def to_the_end(self) -> Recovery:
        """Take all steps that are left.

        Raises:
            ValueError: NaN or infinite logits before the first step, a damaged state.
        """
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
        self.muon.zero_gradients_()
        found = self.divergence.backward(self._window(self.progress.step))
        norm = nn.utils.clip_grad_norm_(self.factors.parameters.values(), MOST_NORM)
        if math.isfinite(found) and math.isfinite(norm):
            self.muon.step_(self.progress.factor * self.settings.rate_at(self.progress.step, self.steps))
        else:
            self.muon.undo_()
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
        return self.training[int(torch.randperm(len(self.training), generator=generator, device="cpu")[place])]

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
        return named | self.muon.tensors

    def _save(self) -> None:
        if self.journal is not None:
            write_state(self.journal, self._tensors(), self.progress)

    def _resume(self) -> None:
        found = None if self.journal is None else read_state_(self.journal, self._tensors())
        if found is not None:
            self.progress = found
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
