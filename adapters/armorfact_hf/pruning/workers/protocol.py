"""What the loop over the decoder blocks asks for, whoever does it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Protocol, TypeVar

from armorfact_hf.model.structure import Layer
from armorfact_hf.pruning.resume.entry import Pruned
from armorfact_hf.pruning.side_by_side import Keep, forget
from armorfact_hf.pruning.tuning.matching import BlockReport

S = TypeVar("S")  # statistics, wherever they are kept


class Workers(Protocol[S]):
    """Hold the model, the calibration windows and their states, and work on one decoder block at a time.

    The states of a window are those of the pruned model and of the dense one, each where the settings follow that
    model. A block is met once, in order: `statistics` or `pass_by` first, both of which move the dense model's states
    on behind it, while the block is dense; then `replace`, then `advance`, which moves those of the pruned model on.
    Whatever they are, workers give the same bits.
    """

    def statistics(self, index: int | None) -> S:
        """The moments of the inputs of a block's layers, over all windows; None is the head.

        Raises:
            NonFiniteActivations: a module computes NaN or infinite values.
        """

    def pass_by(self, index: int) -> None:
        """Move the dense model's states on through a block that needs no statistics."""

    def prune(self, layers: Sequence[Layer], statistics: S, keep: Keep = forget, known: Collection[str] = ()) -> Pruned:
        """What replaces each of the layers, in any order; one that no token reached is left out.

        Args:
            layers: all of a block. keep: called in this process with each as soon as it is done.
            known: names of those that are left out, as an earlier process kept them.

        Raises:
            ValueError: a weight holds NaN or infinite values.
        """

    def match(self, index: int, pruned: Pruned, statistics: S) -> tuple[Pruned, BlockReport | None]:
        """The layers of a block, tuned together towards the states of the dense model behind it.

        Args:
            pruned, statistics: what `prune` and `statistics` returned for this block.
        """

    def match_tail(self, blocks: Sequence[tuple[Pruned, S]]) -> tuple[Pruned, BlockReport | None]:
        """The layers of the last blocks, tuned together towards the words of the dense model.

        Args:
            blocks: for each of the job's tail, its layers, which are in the model, and its statistics.
        """

    def round(self, pruned: Pruned, statistics: S) -> Pruned:
        """The layers with their cores rounded to the dtype that the settings ask for; as they are, if to none.

        Args:
            pruned, statistics: layers of a block, and what `statistics` returned for it.
        """

    def distance(self, index: int | None, pruned: Pruned) -> float:
        """How far a block with these layers, or, with None, the last ones, is from what it was tuned towards.

        Args:
            pruned: all layers of the block, or of the last blocks, which the model holds from then on.
        """

    def replace(self, pruned: Pruned) -> None:
        """Put pruned layers into the model."""

    def advance(self, index: int) -> None:
        """Move the pruned model's states on through a block as it is now."""

    def follow_tail(self) -> None:
        """Bring the pruned model's states to where the blocks of the tail, as they are now, bring them."""
