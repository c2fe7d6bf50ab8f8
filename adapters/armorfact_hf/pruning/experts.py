r"""What is known of the inputs of experts, few of which a sample of tokens reaches.

With H_e the Gram matrix of the tokens that an expert was given, and H_all that of all N tokens given to the experts of
its module, each expert is pruned by

.. math:: H_e + \mu H_{all}, \qquad \mu = n_0 / N

which is what :math:`n_0` more tokens of an average expert would add: per token, :math:`n_e` of its own against
:math:`n_0` borrowed ones. An expert with many tokens goes by its own, a rare one by the average, and one that no token
reached is no special case.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from armorfact_hf.model.moments import Moments, Statistics
from armorfact_hf.model.structure import Layer

BORROWED = 0.25  # n0, in tokens for each input of a layer: the best of a small mixture (benchmarks/experts.py)


@dataclass
class Pool:
    """H_all of layers whose inputs are alike; it grows with the experts that are added.

    Args:
        names: of the layers, in the order of the model. gram: H_all so far, None for no token. tokens: N so far.
    """

    names: Sequence[str]
    gram: Tensor | None = None
    tokens: int = 0

    def add(self, statistics: Statistics) -> None:
        """Count experts, whose statistics are over all calibration tokens; in the order of the model."""
        for name in self.leaders(statistics.leader):
            self.count(statistics.of(name))

    def count(self, moments: Moments) -> None:
        """Count one expert."""
        self.gram = moments.gram.clone() if self.gram is None else self.gram.add_(moments.gram)
        self.tokens += moments.tokens

    def prior(self, borrowed: float = BORROWED) -> Moments | None:
        """What each borrows, of no tokens: all that is known of one that none reached. None where none reached any."""
        if self.gram is None:
            return None
        return Moments(self.gram * (borrowed * len(self.gram) / self.tokens), None, 0)

    def shrink_(self, statistics: Statistics, borrowed: float = BORROWED) -> None:
        """Shrink the moments of some or all of the experts towards those of all, in place.

        Args:
            statistics: over all calibration tokens, of some of the layers; those not reached are put into it.
            borrowed: n0, in tokens for each input of a layer.
        """
        prior = self.prior(borrowed)
        if prior is None:  # they are left as they are
            return
        for name in self.leaders(statistics.leader):
            statistics.gram[name] += prior.gram
        unreached = self.unreached(statistics.leader)
        for name in unreached:
            statistics.leader[name] = unreached[0]
            statistics.gram[unreached[0]], statistics.tokens[unreached[0]] = prior.gram, prior.tokens

    def leaders(self, leader: Mapping[str, str]) -> list[str]:
        """The layers with moments of their own, of a ``leader`` as in `Statistics`."""
        return [name for name in self.names if leader.get(name) == name]

    def unreached(self, leader: Mapping[str, str]) -> list[str]:
        """Those that no token reached, and nothing was put in for."""
        return [name for name in self.names if name not in leader]


def pools_of(layers: Iterable[Layer]) -> list[Pool]:
    """A pool for each kind of input that experts among the layers have."""
    alike: dict[tuple[str, str], list[str]] = {}
    for layer in layers:
        if layer.stack:
            kind = "inputs" if layer.name.endswith((".gate", ".up")) else "intermediate"
            alike.setdefault((layer.stack, kind), []).append(layer.name)
    return [Pool(names) for names in alike.values()]


def pool_(statistics: Statistics, layers: Iterable[Layer], borrowed: float = BORROWED) -> None:
    """Shrink the moments of experts towards those of their module, in place.

    Args:
        statistics: over all calibration tokens. layers: those of a decoder block, experts' among them or not.
        borrowed: n0, in tokens for each input of a layer.
    """
    for pool in pools_of(layers):
        pool.add(statistics)
        pool.shrink_(statistics, borrowed)
