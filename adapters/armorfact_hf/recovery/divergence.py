"""The divergence of a pruned model from its dense one (`armorfact_hf.model.token_divergence`), and its gradients.

The gradients of all the states that the head is given go back through the body at once.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from armorfact_hf.model.stream import replaced_forward
from armorfact_hf.model.token_divergence import BodyAndHead, TokenDivergence
from armorfact_hf.recovery.stored_teacher import StoredTeacher


class Divergence:
    """D of a student from a teacher.

    Args:
        student: a causal language model in evaluation mode. teacher: another with its vocabulary, or one on disk.
        gradient_checkpointing: see `RecoverySettings`.
    """

    def __init__(self, student: Any, teacher: Any, gradient_checkpointing: bool = False) -> None:
        self.student = BodyAndHead(student)
        self.teacher = teacher if isinstance(teacher, StoredTeacher) else BodyAndHead(teacher)
        self.divergence = TokenDivergence(self.student, self.teacher)
        self.again = gradient_checkpointing

    @torch.no_grad()
    def of(self, window: Tensor) -> float:
        """D on a window (length,) of token numbers, each model computing as it is."""
        return self.divergence.of(window, self.student.states(window), self.teacher.recall(window))

    def backward(self, window: Tensor) -> float:
        """D on a window, products of the student in bfloat16; gradients are added to what asks for them in it.

        Raises:
            ValueError: nothing that asks for them is reached.
        """
        recalled = self.teacher.recall(window)
        with torch.autocast(self.student.model.device.type, torch.bfloat16):
            states = self.states_with_gradients(window)
        if not states.requires_grad:
            raise ValueError(
                "no gradient reaches the pruned layers through this model: a module after them cuts it off (some "
                "quantized layers do); load the other weights in float32 or bfloat16"
            )
        total, gradients = self.divergence.gradient(window, states.detach(), recalled)
        states.backward(gradients)
        return total

    def states_with_gradients(self, window: Tensor) -> Tensor:
        """What the student's head is given, to go back from."""
        model, stream, given = self.student.model, self.student.stream, []

        def narrow(x: Tensor) -> Tensor:
            given.append(x)
            return x[..., :1]

        with ExitStack() as stack:
            for block in stream.blocks if self.again else ():  # computed a second time on the way back, to keep less
                stack.enter_context(replaced_forward(block, _computed_again(block.forward)))
            stack.enter_context(replaced_forward(self.student.head, narrow))
            stack.enter_context(stream.noting())
            model(input_ids=window[None].to(model.device), use_cache=False)
        return given[0]


def _computed_again(forward: Callable[..., Any]) -> Callable[..., Any]:
    return partial(checkpoint, forward, use_reentrant=False)
