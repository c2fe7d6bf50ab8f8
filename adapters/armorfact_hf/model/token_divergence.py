r"""The divergence of next-token distributions of two models, and its gradient at what the head is given.

.. math:: D = \operatorname{mean}_t \; \sum_w p_t(w) \log\bigl(p_t(w) / q_t(w)\bigr)

over positions t of a window, p those of the dense model (the teacher), q those of the pruned one (the student).
The logits of a whole window never stand in memory: the head is run on a few positions at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from armorfact_hf.model.stream import BlockStream
from armorfact_hf.model.structure import decoder_blocks

# Positions whose logits stand in memory at a time: with 262k words in the vocabulary, 0.07 GB in bfloat16.
POSITIONS_AT_ONCE = 128
HEAD_CUTS_OFF = (
    "no gradient comes through the model's head (some quantized layers pass none on): load its weights in float32 or "
    "bfloat16"
)
# Logarithms of probabilities that are made of them at a time: 4 MB, which stay in the processor's cache, and which the
# allocator has at hand. Of whole positions; larger tensors are new pages from the system each time.
LOGARITHMS_AT_ONCE = 2**20


class Distribution(Protocol):
    """A teacher's probabilities of the next token at some positions: its `Logits`, or what was kept of them on disk."""

    def divergence(self, said: Tensor, rows: slice) -> Tensor:
        """The sum over some of these positions of the divergence of what a student says there.

        Args:
            said: the logarithms of its probabilities, (rows, vocabulary). rows: which of the positions they are of.
        """


class Teacher(Protocol):
    """Whose words a student's are compared with: a `BodyAndHead`, or what was kept of one on disk.

    Attributes:
        vocabulary: the number of words.
    """

    vocabulary: int

    def recall(self, window: Tensor) -> Any:
        """What there is to know of a window (length,), to be handed to `distribution`."""

    def distribution(self, window: Tensor, part: slice, recalled: Any) -> Distribution:
        """The teacher's at some positions of a window; without gradients."""


@dataclass(frozen=True)
class Logits:
    """Whole vocabularies.

    Args:
        values: what a head returns, (positions, vocabulary).
    """

    values: Tensor

    def logs(self, rows: slice = slice(None)) -> Tensor:
        """The logarithms of the probabilities, (rows, vocabulary), float32 or float64."""
        values = self.values[rows]
        return functional.log_softmax(values.to(torch.promote_types(values.dtype, torch.float32)), dim=-1)

    def divergence(self, said: Tensor, rows: slice) -> Tensor:
        """See `Distribution`; the gradient is that at ``said``."""
        with torch.no_grad():
            wanted = self.logs(rows).to(said.device)
        return functional.kl_div(said, wanted, reduction="sum", log_target=True)

    @property
    def few_rows(self) -> Iterator[slice]:
        """All positions, a few at a time."""
        count, vocabulary = self.values.shape
        step = max(LOGARITHMS_AT_ONCE // vocabulary, 1)
        return (slice(lo, min(lo + step, count)) for lo in range(0, count, step))


class BodyAndHead:
    """A causal language model in two parts: the body, and the head that makes words of its states.

    Args:
        stream: one that the blocks were run by already, or None.
    """

    def __init__(self, model: Any, stream: BlockStream | None = None) -> None:
        self.model = model
        self.stream = stream or BlockStream(model, decoder_blocks(model)[1])
        self.vocabulary: int = model.get_input_embeddings().num_embeddings

    @property
    def head(self) -> nn.Module:
        """The head as it is now: a pruned one is exchanged while it is trained."""
        return cast(nn.Module, self.model.get_output_embeddings())

    def states(self, window: Tensor) -> Tensor:
        """What the head is given, (1, length, width); without gradients."""
        return self.stream.head_input(self.head, window[None].to(self.model.device))

    def logits(self, window: Tensor, states: Tensor) -> Logits:
        """What the head makes of states.

        Args:
            window: (positions,) token numbers, without influence. states: (1, positions, width) that the head is given.
        """
        return Logits(self.stream.logits(self.head, window[None], states)[0])

    def recall(self, window: Tensor) -> Tensor:
        """See `Teacher`: the `states`."""
        return self.states(window)

    def distribution(self, window: Tensor, part: slice, recalled: Tensor) -> Logits:
        """See `Teacher`."""
        with torch.no_grad(), torch.autocast(self.model.device.type, enabled=False):
            return self.logits(window[part], recalled[:, part])


@dataclass(frozen=True)
class TokenDivergence:
    """D of a student from a teacher, of states that the student's head is given; the two may be one and the same.

    Args:
        student, teacher: of one vocabulary.
    """

    student: BodyAndHead
    teacher: Teacher

    @torch.no_grad()
    def of(self, window: Tensor, states: Tensor, recalled: Any, every: int = 1) -> float:
        """D on a window.

        Args:
            window: (length,) token numbers. states: of the student, (1, length, width). recalled: of the teacher.
            every: look at each so-manieth position only.
        """
        total, count = 0.0, len(range(0, len(window), every))
        for part in _parts(window, 0, every):
            wanted = self.teacher.distribution(window, part, recalled)
            said = self.student.logits(window[part], states[:, part])
            total += sum(float(wanted.divergence(said.logs(rows), rows)) for rows in said.few_rows)
        return total / count

    @torch.enable_grad()
    def gradient(
        self, window: Tensor, states: Tensor, recalled: Any, every: int = 1, first: int = 0
    ) -> tuple[float, Tensor]:
        """D on a window, products of the student in bfloat16, and its gradient at ``states``.

        Gradients at the parameters of the student's head are added to those that ask for them.

        Args:
            window, states, recalled, every: as in `of`. first: the first position that is looked at.
        """
        total, gradients, count = 0.0, torch.zeros_like(states), len(range(first, len(window), every))
        for part in _parts(window, first, every):
            piece = states[:, part].detach().requires_grad_()
            with torch.autocast(self.student.model.device.type, torch.bfloat16):
                logits = self.student.logits(window[part], piece).values
            if not logits.requires_grad:
                raise ValueError(HEAD_CUTS_OFF)
            wanted = self.teacher.distribution(window, part, recalled)
            found, gradient = _at_logits(logits.detach(), wanted, count)
            logits.backward(gradient)
            gradients[:, part] = cast(Tensor, piece.grad)
            total += found
        return total, gradients


def _at_logits(logits: Tensor, wanted: Distribution, count: int) -> tuple[float, Tensor]:
    """What some of ``count`` positions add to D, and the gradient of that at the student's logits."""
    total, gradient = 0.0, torch.empty_like(logits)
    for rows in Logits(logits).few_rows:
        piece = logits[rows].requires_grad_()
        found = wanted.divergence(Logits(piece).logs(), rows) / count
        gradient[rows] = torch.autograd.grad(found, piece)[0]
        total += float(found.detach())
    return total, gradient


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
