r"""What is known of the inputs of experts, few of which a sample of tokens reaches.

With H_e the Gram matrix of the tokens that an expert was given, and H_all that of all N tokens given to the experts of
its module, each expert is pruned by

.. math:: H_e + \mu H_{all}, \qquad \mu = n_0 / N

which is what :math:`n_0` more tokens of an average expert would add: per token, :math:`n_e` of its own against
:math:`n_0` borrowed ones. An expert with many tokens goes by its own, a rare one by the average, and one that no token
reached is no special case.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from armorfact_hf.model.moments import Moments, Statistics
from armorfact_hf.model.structure import Layer

BORROWED = 0.25  # n0, in tokens for each input of a layer: the best of a small mixture (benchmarks/experts.py)


@dataclass(frozen=True)
class Alike:
    """Layers of the experts of one module whose inputs are alike.

    Args:
        leaders: names of those with moments of their own, one or more. unreached: of those that no token reached.
    """

    leaders: tuple[str, ...]
    unreached: tuple[str, ...]


def alike(layers: Iterable[Layer], leader: Mapping[str, str]) -> list[Alike]:
    """The experts' layers among those of a decoder block; where no token reached any, they are left out.

    Args:
        leader: as in `Statistics`.
    """
    groups: dict[tuple[str, str], list[str]] = {}
    for layer in layers:
        if layer.stack:
            kind = "inputs" if layer.name.endswith((".gate", ".up")) else "intermediate"
            groups.setdefault((layer.stack, kind), []).append(layer.name)
    found = [
        Alike(
            tuple(name for name in names if leader.get(name) == name),
            tuple(name for name in names if name not in leader),
        )
        for names in groups.values()
    ]
    return [group for group in found if group.leaders]


def prior_of(moments: Iterable[Moments], borrowed: float = BORROWED) -> Moments:
    r"""What every expert borrows, :math:`\mu H_{all}`, of no tokens: all that is known of one that none reached.

    Args:
        moments: of the leaders of an `Alike`, in order; one at a time is looked at.
        borrowed: n0, in tokens for each input of a layer.
    """
    each = iter(moments)
    first = next(each)
    pooled, tokens = first.gram.clone(), first.tokens
    for one in each:
        pooled += one.gram
        tokens += one.tokens
    pooled *= borrowed * len(pooled) / tokens
    return Moments(pooled, None, 0)


def pool_(statistics: Statistics, layers: Iterable[Layer], borrowed: float = BORROWED) -> None:
    """Shrink the moments of experts towards those of their module, in place.

    Args:
        statistics: over all calibration tokens. layers: those of a decoder block, experts' among them or not.
        borrowed: as for `prior_of`.
    """
    for group in alike(layers, statistics.leader):
        prior = prior_of(map(statistics.of, group.leaders), borrowed)
        for name in group.leaders:
            statistics.gram[name] += prior.gram
        for name in group.unreached:
            statistics.leader[name] = group.unreached[0]
            statistics.gram[group.unreached[0]], statistics.tokens[group.unreached[0]] = prior.gram, prior.tokens
