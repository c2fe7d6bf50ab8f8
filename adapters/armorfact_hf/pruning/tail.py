"""The last decoder blocks, from when each of them is pruned until they are tuned once more, together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from torch import Tensor

from armorfact_hf.model.words import Speaker, WordsApart
from armorfact_hf.pruning.job import Job
from armorfact_hf.pruning.resume.entry import Finished, Pruned
from armorfact_hf.pruning.states import States
from armorfact_hf.pruning.tuning.aims import WordAim

S = TypeVar("S")


@dataclass
class Tail(Generic[S]):
    """What is kept of the last blocks. Nothing follows them but a norm and the head, so words can be looked at.

    Args:
        finished: what a killed run left of the tuning, or None.
        blocks: for each of them, its layers, tuned by themselves, and the statistics of their inputs. They grow.
    """

    finished: Finished | None = None
    blocks: list[tuple[Pruned, S]] = field(default_factory=list)


def words_of(job: Job, given: States, dense: States, told: Callable[[], bool]) -> WordAim:
    """The words of the dense model.

    Args:
        given: the states before the first of the last blocks. dense: those of the dense model behind the last one.
        told: is called before each window; says whether gradients are going to be asked for.
    """
    stream, tokens = given.stream, given.windows
    speaker = Speaker(job.model, stream)

    def run(window: int) -> Tensor:
        return stream.head_input(speaker.head, tokens[window], given.hidden[window], job.tail.start, told())

    def taught(window: int) -> Tensor:
        return stream.head_input(speaker.head, tokens[window], dense.hidden[window])

    return WordAim(run, job.tokens, taught, WordsApart(speaker, speaker))
