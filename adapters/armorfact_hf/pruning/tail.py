"""The last decoder blocks, from when each of them is pruned until they are tuned once more, together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from armorfact_hf.model.moments import Moments, Statistics
from armorfact_hf.model.words import Speaker, WordsApart
from armorfact_hf.pruning.aims import WordAim
from armorfact_hf.pruning.job import Job
from armorfact_hf.pruning.journal import Finished, Pruned
from armorfact_hf.pruning.states import States


@dataclass
class Tail:
    """What is kept of the last blocks. Nothing follows them but a norm and the head, so words can be looked at.

    Args:
        given: the states before the first of them.
        finished: what a killed run left of the tuning, or None.
        pruned: their layers, each tuned with its own block. It grows.
        moments: of the inputs of these layers. They grow.
    """

    given: States | None = None
    finished: Finished | None = None
    pruned: Pruned = field(default_factory=list)
    moments: dict[str, Moments] = field(default_factory=dict)

    def add(self, pruned: Pruned, statistics: Statistics) -> None:
        """Keep what is known of one more block."""
        self.pruned += pruned
        self.moments |= {report.name: statistics.of(report.name) for _, report in pruned}

    def follow_(self, job: Job, states: States) -> None:
        """Bring states that stand behind the blocks as they were to where the blocks, as they are, bring them."""
        given = _known(self.given)
        for window in range(len(job.tokens)):
            for index in job.tail:
                given.advance(index, window)
            states.hidden[window] = given.hidden[window]


def words_of(job: Job, tail: Tail, dense: States, told: Callable[[], bool]) -> WordAim:
    """The words of the dense model, whose states ``dense`` stand behind the last block.

    Args:
        told: is called before each window; says whether gradients are going to be asked for.
    """
    given = _known(tail.given)
    stream, tokens = given.stream, given.windows
    speaker = Speaker(job.model, stream)

    def run(window: int) -> Tensor:
        return stream.head_input(speaker.head, tokens[window], given.hidden[window], job.tail.start, told())

    def taught(window: int) -> Tensor:
        return stream.head_input(speaker.head, tokens[window], dense.hidden[window])

    return WordAim(run, job.tokens, taught, WordsApart(speaker, speaker))


def _known(given: States | None) -> States:
    if given is None:
        raise RuntimeError("the last blocks were not reached yet")
    return given
