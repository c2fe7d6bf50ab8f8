"""The states of calibration windows as they flow from decoder block to decoder block, in both models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from armorfact_hf.model.experts import run_by_expert
from armorfact_hf.model.moments import Inputs
from armorfact_hf.model.stream import BlockStream
from armorfact_hf.pruning.job import Job
from armorfact_hf.pruning.states import States

Notify = Callable[[int, int], None]


@dataclass
class Flow:
    """Some or all windows of a job, between two of its decoder blocks.

    Statistics are taken from the pruned model's states if there are any, and paired with the dense one's if there are
    both. While a block is worked on, ``pruned`` stands before it and ``dense`` behind it.

    Args:
        job: what is pruned.
        windows: the numbers of those held here.
        notify: is called with a block and a window before one is run through the other for the first time.
        pruned, dense: the states of the model being pruned and of the dense one, or None. They move on.
        given: the states that the block at work is given. before_tail: those that the first of the last blocks is.
    """

    job: Job
    windows: Sequence[int]
    notify: Notify
    pruned: States | None
    dense: States | None
    given: States | None = None
    before_tail: States | None = None

    @classmethod
    def of(cls, job: Job, windows: Sequence[int], notify: Notify, folder: Path | None = None) -> Flow:
        """The windows before the first block; their states wait in files of ``folder`` if there is one."""
        stream = BlockStream(job.model, job.blocks)
        start = States.before_the_first(stream, job.prefix, job.tokens.split(1), folder)
        pruned, dense = (start.copy() if followed else None for followed in (job.follows_pruned, job.follows_dense))
        return cls(job, windows, notify, pruned, dense)

    def begin(self, index: int) -> None:
        """Come to a block: keep what it is given, as the states of the dense model are about to move on."""
        self.given = self._followed[0].copy()
        if index == self.job.tail.start and self.job.tail:
            self.before_tail = self.given

    def inputs(self, index: int | None, window: int) -> list[Inputs]:
        """What the layers of a block (None: the head) are given for a window, in the pruned model and the dense one.

        Of the two, the first is what statistics are taken from; the other is left out where they are not paired. The
        dense model's states move on.
        """
        layers = self.job.modules_of(index)
        seen = []
        for states in self._followed:
            if index is None:
                [(name, head)] = layers.items()
                seen.append(states.head_input(name, head, window))
            else:
                self.notify(index, window)
                with run_by_expert(layers):
                    seen.append(states.inputs(index, window, layers, advance=states is self.dense))
        return seen if self.job.config.target == "output" else seen[:1]

    def pass_by(self, index: int) -> None:
        """Move the dense model's states on through a block while it is dense."""
        with run_by_expert(self.job.modules_of(index)):  # as where statistics are gathered, for the sake of equal bits
            for window in self.windows:
                if self.pruned is not None:
                    self.notify(index, window)
                if self.dense is not None:
                    self.notify(index, window)
                    self.dense.advance(index, window)

    def advance(self, index: int) -> None:
        """Move the pruned model's states on through a block as it is now."""
        self.given = None  # or every state would be there twice
        if self.pruned is not None:
            for window in self.windows:
                self.notify(index, window)
                self.pruned.advance(index, window)

    def follow_tail(self) -> None:
        """Bring the pruned model's states to where the last blocks, as they are now, bring those before them."""
        if self.pruned is None:
            return
        given = _known(self.before_tail)
        for window in self.windows:
            for index in self.job.tail:
                given.advance(index, window)
            self.pruned.hidden[window] = given.hidden[window]

    @property
    def before_block(self) -> States:
        """The states that the block at work is given."""
        return _known(self.given)

    @property
    def around_block(self) -> tuple[States, States]:
        """The states that the block at work is given, and those of the dense model behind it."""
        return self.before_block, _known(self.dense)

    @property
    def around_tail(self) -> tuple[States, States]:
        """The states that the first of the last blocks is given, and those of the dense model behind the last."""
        return _known(self.before_tail), _known(self.dense)

    @property
    def _followed(self) -> list[States]:
        """What statistics are taken from first."""
        return [states for states in (self.pruned, self.dense) if states is not None]


def _known(states: States | None) -> States:
    if states is None:
        raise RuntimeError("these states are not followed, or were not reached yet")
    return states
