r"""What a pruned decoder block is tuned towards: the dense model's states behind it or, behind the last, its words.

States y_t, from f(h_t), what the pruned block makes of a token:

.. math:: \operatorname{mean}_t \; \|f(h_t) - y_t\|_w^2 / \|y_t\|_w^2, \qquad w_c = 1 / \operatorname{mean}_t y_{tc}^2

relative, since a norm follows in every model and a few tokens with huge states would own a plain sum; and every
channel on a scale of its own, since a few huge channels would own that as well. Those of Gemma 3 carry nearly all of
the energy, and the weights of the norms that follow take it away again: for them the rest of the state was given up
(docs/results.md). Nothing follows the last block but a norm and the head, so there the divergence of the words can be
had at once (`armorfact_hf.model.token_divergence`), and it is what the whole work is for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from armorfact_hf.model.token_divergence import TokenDivergence

LOGITS_A_STEP = 2**26  # of one window; of longer windows and larger vocabularies, some positions are looked at


class Aim(Protocol):
    """A distance to bring down.

    Attributes:
        unit: what the distance is measured in.
    """

    unit: ClassVar[str]

    @property
    def run(self) -> Callable[[int], Tensor]:
        """Gives what the model makes of a window by its number, with gradients where they are enabled."""

    @property
    def windows(self) -> int:
        """How many there are."""

    def distance(self, output: Tensor, window: int) -> float:
        """How far the ``output`` of a window is from where it should be."""

    def gradient(self, output: Tensor, window: int, step: int) -> tuple[float, Tensor]:
        """That distance, or an estimate of it for this step, and its gradient at ``output``."""


@dataclass(frozen=True)
class StateAim:
    """The states of the dense model behind the block, every channel on its own scale.

    Args:
        run: gives the states behind the pruned block, (1, length, width).
        targets: y, the same shape, one a window.
    """

    run: Callable[[int], Tensor]
    targets: Sequence[Tensor]
    unit: ClassVar[str] = "relative error"

    @property
    def windows(self) -> int:
        """How many there are."""
        return len(self.targets)

    @cached_property
    def weights(self) -> Tensor:
        """w, (width,) float32; a channel that is all but silent gets no more than a million times the median's."""
        energy = torch.stack([target.float().square().flatten(0, -2).mean(0) for target in self.targets]).mean(0)
        return 1 / energy.clamp_min(max(1e-6 * float(energy.median()), torch.finfo(torch.float32).tiny))

    def distance(self, output: Tensor, window: int) -> float:
        """The relative error, the mean over tokens."""
        return float(relative_error(output, self.targets[window], self.weights))

    def gradient(self, output: Tensor, window: int, step: int) -> tuple[float, Tensor]:
        """The relative error and its gradient."""
        with torch.enable_grad():
            given = output.detach().float().requires_grad_()
            error = relative_error(given, self.targets[window], self.weights)
            return float(error.detach()), torch.autograd.grad(error, given)[0]


def relative_error(output: Tensor, target: Tensor, weights: Tensor) -> Tensor:
    """The mean over tokens of ||output - target||^2 / ||target||^2, squares weighted, a scalar float32.

    Args:
        output, target: (..., width). weights: w, (width,).
    """
    output, target = output.float(), target.float()
    energy = (target.square() * weights).sum(-1).clamp_min(torch.finfo(torch.float32).tiny)
    return (((output - target).square() * weights).sum(-1) / energy).mean()


@dataclass(frozen=True)
class TokenAim:
    """The words of the dense model.

    Args:
        run: gives what the head is given for a window, (1, length, width).
        tokens: (windows, length).
        recall: gives what the head is given by the dense model, as ``run`` does.
        divergence: compares them.
    """

    run: Callable[[int], Tensor]
    tokens: Tensor
    recall: Callable[[int], Tensor]
    divergence: TokenDivergence
    unit: ClassVar[str] = "nats a token"

    @property
    def windows(self) -> int:
        """How many there are."""
        return len(self.tokens)

    @property
    def every(self) -> int:
        """One position in so many is looked at."""
        logits = self.tokens.shape[1] * self.divergence.student.vocabulary
        return -(-logits // LOGITS_A_STEP)

    def distance(self, output: Tensor, window: int) -> float:
        """The divergence, the mean over positions."""
        return self.divergence.of(self.tokens[window], output, self.recall(window), self.every)

    def gradient(self, output: Tensor, window: int, step: int) -> tuple[float, Tensor]:
        """The divergence at other positions from step to step, and its gradient."""
        return self.divergence.gradient(
            self.tokens[window], output.detach(), self.recall(window), self.every, step % self.every
        )
