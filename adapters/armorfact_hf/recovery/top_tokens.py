r"""The likeliest words of each position, in the place of the whole vocabulary.

With the K likeliest words of the teacher and all others taken as one, the divergence of a student is

.. math:: D_K = \sum_{w \in K} p(w) \log\frac{p(w)}{q(w)} + \bar p \log\frac{\bar p}{\bar q},
          \qquad \bar p = 1 - \sum_{w \in K} p(w), \quad \bar q = 1 - \sum_{w \in K} q(w)

It is never above the divergence of whole vocabularies, by the log-sum inequality, and is that where K holds all words.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

# The logarithm of what is nothing: finite, as float16 has to hold it, and as zero times infinity is not a number.
NOTHING = -1e4
BYTES_A_WORD, BYTES_OF_REST = 6, 4  # on disk, at a position


@dataclass(frozen=True)
class TopTokens:
    """What is kept of a teacher's words.

    Args:
        words: token numbers by falling probability, (positions, K) int64.
        logs: the logarithms of their probabilities, and at the end that of all others together, (positions, K + 1).
    """

    words: Tensor
    logs: Tensor

    @classmethod
    def of(cls, logs: Tensor, count: int) -> TopTokens:
        """Of whole vocabularies.

        Args:
            logs: the logarithms of the probabilities, (positions, vocabulary). count: K, no more than the vocabulary.
        """
        found = logs.topk(count, dim=-1)
        return cls(found.indices, _with_rest(found.values, logs, found.indices))

    @property
    def tensors(self) -> dict[str, Tensor]:
        """As they are stored, rounded: float16 is off by 0.2% of a probability of 1%, and by less of larger ones."""
        logs, rest = self.logs[:, :-1], self.logs[:, -1]
        return {"words": self.words.int(), "logs": logs.half(), "rest": rest.float()}

    @classmethod
    def from_tensors(cls, words: Tensor, logs: Tensor, rest: Tensor) -> TopTokens:
        """The inverse of `tensors`, scaled so that probabilities add up to 1 again."""
        together = torch.cat([logs.float(), rest[:, None]], dim=-1)
        return cls(words.long(), functional.log_softmax(together, dim=-1).clamp_min(NOTHING))

    def at(self, part: slice) -> TopTokens:
        """Of some of the positions."""
        return TopTokens(self.words[part], self.logs[part])

    def divergence(self, said: Tensor, rows: slice = slice(None)) -> Tensor:
        """D_K summed over positions, see `armorfact_hf.model.token_divergence.Distribution`.

        Args:
            said: the logarithms of the student's probabilities there, (rows, vocabulary). rows: the positions.
        """
        words, logs = self.words[rows].to(said.device), self.logs[rows].to(said.device)
        grouped = _with_rest(said.gather(-1, words), said, words)
        return functional.kl_div(grouped, logs.to(said.dtype), reduction="sum", log_target=True)


def _with_rest(kept: Tensor, logs: Tensor, words: Tensor) -> Tensor:
    """The logarithms kept, and that of what all other words have together."""
    rest = logs.scatter(-1, words, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([kept, rest], dim=-1).clamp_min(NOTHING)
