r"""How far the words of one model are from those of another, and the gradient of that at what its head is given.

.. math:: D = \operatorname{mean}_t \; \sum_w p_t(w) \log\bigl(p_t(w) / q_t(w)\bigr)

over positions t of a window, p what the dense model (the teacher) says there, q what the pruned one (the student) does.
The logits of a whole window never stand in memory: the head is run on a few positions at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.nn import functional

from armorfact_hf.model.stream import BlockStream
from armorfact_hf.model.structure import decoder_blocks

# Positions whose logits stand in memory at a time: with 262k words in the vocabulary, 0.13 GB in float32, a few times.
POSITIONS_AT_ONCE = 128


class Teacher(Protocol):
    """Whose words a student's are compared with: a `Speaker`, or what was kept of one on disk.

    Attributes:
        vocabulary: the number of words.
    """

    vocabulary: int

    def taught(self, window: Tensor) -> Any:
        """What there is to know of a window (length,), to be handed to `divergence`."""

    def divergence(self, said: Tensor, window: Tensor, part: slice, taught: Any) -> Tensor:
        """The sum over some positions of a window of the divergence of what a student says there.

        Args:
            said: the logarithms of its probabilities at these positions, (positions, vocabulary). part: which they are.
        """


class Speaker:
    """A causal language model in two parts: the body, and the head that makes words of its states.

    Args:
        stream: one that the blocks were run by already, or None.
    """

    def __init__(self, model: Any, stream: BlockStream | None = None) -> None:
        self.model, self.head = model, model.get_output_embeddings()
        self.stream = stream or BlockStream(model, decoder_blocks(model)[1])
        self.vocabulary: int = model.get_input_embeddings().num_embeddings

    def states(self, window: Tensor) -> Tensor:
        """What the head is given, (1, length, width); without gradients."""
        return self.stream.head_input(self.head, window[None].to(self.model.device))

    def words(self, window: Tensor, states: Tensor) -> Tensor:
        """The logarithms of the probabilities, (positions, vocabulary), float32 or float64.

        Args:
            window: (positions,) token numbers, without influence. states: (1, positions, width) that the head is given.
        """
        logits = self.stream.logits(self.head, window[None], states)[0]
        return functional.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), dim=-1)

    def taught(self, window: Tensor) -> Tensor:
        """See `Teacher`: the `states`."""
        return self.states(window)

    def divergence(self, said: Tensor, window: Tensor, part: slice, taught: Tensor) -> Tensor:
        """See `Teacher`; the gradient is that at ``said``."""
        with torch.no_grad(), torch.autocast(self.model.device.type, enabled=False):
            wanted = self.words(window[part], taught[:, part]).to(said.device)
        return functional.kl_div(said, wanted, reduction="sum", log_target=True)


@dataclass(frozen=True)
class WordsApart:
    """D of a student from a teacher, of states that the student's head is given; the two may be one and the same.

    Args:
        student, teacher: of one vocabulary.
    """

    student: Speaker
    teacher: Teacher

    @torch.no_grad()
    def of(self, window: Tensor, states: Tensor, taught: Any, every: int = 1) -> float:
        """D on a window.

        Args:
            window: (length,) token numbers. states: of the student, (1, length, width). taught: of the teacher.
            every: look at each so-manieth position only.
        """
        count = len(range(0, len(window), every))
        parts = [self._part(window, part, states[:, part], taught, count) for part in _parts(window, 0, every)]
        return float(sum(part.double() for part in parts))

    @torch.enable_grad()
    def gradient(
        self, window: Tensor, states: Tensor, taught: Any, every: int = 1, first: int = 0
    ) -> tuple[float, Tensor]:
        """D on a window, products of the student in bfloat16, and its gradient at ``states``.

        Gradients at the parameters of the student's head are added to those that ask for them.

        Args:
            window, states, taught, every: as in `of`. first: the first position that is looked at.
        """
        total, gradients, count = 0.0, torch.zeros_like(states), len(range(first, len(window), every))
        for part in _parts(window, first, every):
            piece = states[:, part].detach().requires_grad_()
            with torch.autocast(self.student.model.device.type, torch.bfloat16):
                divergence = self._part(window, part, piece, taught, count)
            divergence.backward()
            gradients[:, part] = cast(Tensor, piece.grad)
            total += float(divergence.detach())
        return total, gradients

    def _part(self, window: Tensor, part: slice, states: Tensor, taught: Any, count: int) -> Tensor:
        """What some of ``count`` positions add to D."""
        return self.teacher.divergence(self.student.words(window[part], states), window, part, taught) / count


def _parts(window: Tensor, first: int, every: int) -> Iterator[slice]:
    for lo in range(first, len(window), POSITIONS_AT_ONCE * every):
        yield slice(lo, min(lo + POSITIONS_AT_ONCE * every, len(window)), every)


def drawn_gradient(stream: BlockStream, tokens: Tensor, given: Tensor, seed: int, every: int = 1) -> Tensor:
    """The gradient of the log-likelihood of words drawn from the model's own probabilities, (1, length, width).

    Args:
        stream: runs the model's head. tokens: (1, length). given: (1, length, width) that the head is given.
        seed: of the words. every: draw at each so-manieth position only, and scale: words are drawn independently, so
            that second moments add up, and some positions stand for all.
    """
    gradient, generator = torch.zeros_like(given), torch.Generator().manual_seed(seed)
    for lo in range(seed % every, given.shape[1], POSITIONS_AT_ONCE * every):
        part = slice(lo, lo + POSITIONS_AT_ONCE * every, every)
        gradient[:, part] = every**0.5 * _drawn_at(stream, tokens[:, part], given[:, part], generator)
    return gradient


def _drawn_at(stream: BlockStream, tokens: Tensor, given: Tensor, generator: torch.Generator) -> Tensor:
    piece = given.detach().requires_grad_()
    with torch.enable_grad():
        logits = stream.logits(stream.model.get_output_embeddings(), tokens, piece)[0].float()
        words = torch.multinomial(logits.detach().softmax(-1).cpu(), 1, generator=generator)[:, 0]
        likelihood = -functional.cross_entropy(logits, words.to(logits.device), reduction="sum")
    return torch.autograd.grad(likelihood, piece)[0]
