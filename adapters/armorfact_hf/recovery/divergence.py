r"""How far a pruned model's words are from its dense model's, and the gradient of that.

.. math:: D = \operatorname{mean}_t \; \sum_w p_t(w) \log\bigl(p_t(w) / q_t(w)\bigr)

over the positions t of a window, p what the dense model (the teacher) says there, q what the pruned one (the student)
does. The logits of a whole window never stand in memory: the head is run on a few positions at a time, back to the
states that it is given, and the gradients of all those states then go through the body at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from armorfact_hf.model.stream import BlockStream, replaced_forward
from armorfact_hf.model.structure import decoder_blocks

# Positions whose logits stand in memory at a time: with 262k words in the vocabulary, 0.13 GB in float32, a few times.
POSITIONS_AT_ONCE = 128


class Speaker:
    """A causal language model in two parts: the body, and the head that makes words of its states."""

    def __init__(self, model: Any) -> None:
        self.model, self.head = model, model.get_output_embeddings()
        self.stream = BlockStream(model, decoder_blocks(model)[1])

    def states(self, window: Tensor) -> Tensor:
        """What the head is given, (1, length, width); without gradients."""
        return self.stream.head_input(self.head, window[None].to(self.model.device))

    def states_with_gradients(self, window: Tensor, again: bool) -> Tensor:
        """The same, to go back from; ``again`` computes every block a second time then, to keep less of it."""
        given = []

        def narrow(x: Tensor) -> Tensor:
            given.append(x)
            return x[..., :1]

        with ExitStack() as stack:
            for block in self.stream.blocks if again else ():
                stack.enter_context(replaced_forward(block, _computed_again(block.forward)))
            stack.enter_context(replaced_forward(self.head, narrow))
            stack.enter_context(self.stream.noting())
            self.model(input_ids=window[None].to(self.model.device), use_cache=False)
        return given[0]

    def words(self, window: Tensor, states: Tensor, part: slice) -> Tensor:
        """The logarithms of the probabilities at some positions, (positions, vocabulary), float32 or float64."""
        logits = self.stream.logits(self.head, window[None, part], states)[0]
        return functional.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), dim=-1)


def _computed_again(forward: Callable[..., Any]) -> Callable[..., Any]:
    return partial(checkpoint, forward, use_reentrant=False)


class Divergence:
    """D of a student from a teacher.

    Args:
        student, teacher: causal language models with the same vocabulary, in evaluation mode.
        gradient_checkpointing: see `RecoverySettings`.
    """

    def __init__(self, student: Any, teacher: Any, gradient_checkpointing: bool = False) -> None:
        self.student, self.teacher = Speaker(student), Speaker(teacher)
        self.again = gradient_checkpointing

    @torch.no_grad()
    def of(self, window: Tensor) -> float:
        """D on a window (length,) of token numbers, each model computing as it is."""
        states, taught = self.student.states(window), self.teacher.states(window)
        parts = [self._part(window, part, states[:, part], taught) for part in _parts(window)]
        return float(sum(part.double() for part in parts))

    def backward(self, window: Tensor) -> float:
        """D on a window, products of the student in bfloat16; gradients are added to what asks for them in it.

        Raises:
            ValueError: nothing that asks for them is reached.
        """
        taught = self.teacher.states(window)
        with torch.autocast(self.student.model.device.type, torch.bfloat16):
            states = self.student.states_with_gradients(window, self.again)
        if not states.requires_grad:
            raise ValueError(
                "no gradient reaches the pruned layers through this model: a module after them cuts it off (some "
                "quantized layers do); load the other weights in float32 or bfloat16"
            )
        total, gradients = 0.0, torch.zeros_like(states)
        for part in _parts(window):
            piece = states[:, part].detach().requires_grad_()
            piece.grad = gradients[:, part]  # what follows is added in place
            with torch.autocast(self.student.model.device.type, torch.bfloat16):
                divergence = self._part(window, part, piece, taught)
            divergence.backward()
            total += float(divergence.detach())
        states.backward(gradients)
        return total

    def _part(self, window: Tensor, part: slice, states: Tensor, taught: Tensor) -> Tensor:
        """What some positions add to D."""
        with torch.no_grad(), torch.autocast(self.teacher.model.device.type, enabled=False):
            wanted = self.teacher.words(window, taught[:, part], part).to(states.device)
        said = self.student.words(window, states, part)
        return functional.kl_div(said, wanted, reduction="sum", log_target=True) / len(window)


def _parts(window: Tensor) -> Iterator[slice]:
    for lo in range(0, len(window), POSITIONS_AT_ONCE):
        yield slice(lo, min(lo + POSITIONS_AT_ONCE, len(window)))
