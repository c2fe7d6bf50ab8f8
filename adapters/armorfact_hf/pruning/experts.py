r"""What is known of the inputs of experts, few of which a sample of tokens reaches.

With H_e the Gram matrix of the tokens that an expert was given, and H_all that of all N tokens given to the experts of
its module, each expert is pruned by

.. math:: H_e + \mu H_{all}, \qquad \mu = n_0 / N

which is what :math:`n_0` more tokens of an average expert would add: per token, :math:`n_e` of its own against
:math:`n_0` borrowed ones. An expert with many tokens goes by its own, a rare one by the average, and one that no token
reached is no special case.
"""

from __future__ import annotations

from collections.abc import Iterable

from armorfact_hf.model.moments import Statistics
from armorfact_hf.model.structure import Layer

BORROWED = 0.25  # n0, in tokens for each input of a layer: the best of a small mixture (benchmarks/experts.py)


def pool_(statistics: Statistics, layers: Iterable[Layer], borrowed: float = BORROWED) -> None:
    """Shrink the moments of experts towards those of their module, in place.

    Args:
        statistics: over all calibration tokens. layers: those of a decoder block, experts' among them or not.
        borrowed: n0, in tokens for each input of a layer.
    """
    alike: dict[tuple[str, str], list[str]] = {}
    for layer in layers:
        if layer.stack:
            kind = "inputs" if layer.name.endswith((".gate", ".up")) else "intermediate"
            alike.setdefault((layer.stack, kind), []).append(layer.name)
    for names in alike.values():
        _pool(statistics, names, borrowed)


def _pool(statistics: Statistics, names: list[str], borrowed: float) -> None:
    """For layers whose inputs are alike."""
    leaders = [name for name in names if statistics.leader.get(name) == name]
    if not leaders:  # no token reached any: they are left as they are
        return
    pooled = sum(statistics.gram[name] for name in leaders[1:]) + statistics.gram[leaders[0]]
    tokens = sum(statistics.tokens[name] for name in leaders)
    pooled *= borrowed * len(pooled) / tokens
    for name in leaders:
        statistics.gram[name] += pooled
    unreached = [name for name in names if name not in statistics.leader]
    for name in unreached:
        statistics.leader[name] = unreached[0]
        statistics.gram[unreached[0]], statistics.tokens[unreached[0]] = pooled, 0
