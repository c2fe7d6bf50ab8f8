r"""The figures that might foretell what pruning one layer costs the model, all quadratic in the error R = W - W'.

With the inputs x_t of T tokens, weights s_t of mean 1 and the Gram matrix of the output gradients, G:

==========  ===========================================================================================
H           tr(R H R'), H = X X' / T
H + diag H  the same with H + diag(H), the objective of `armorfact.factorize` as the adapters call it
diag H      the same with diag(H)
paper       sum_ij diag(H)_j (R_ij / (r1_j r2_i))^2, the ARMOR paper's: NoWag's scales of columns and rows
H~          tr(R H~ R'), H~ = sum_t s_t x_t x_t' / T, s_t = mean_j g_tj^2 over its mean, clipped at 100
G-H, G-H~   tr(G R H R') and tr(G R H~ R'), G = E[g g'] in blocks on the diagonal, the blocks of A
==========  ===========================================================================================
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from armorfact.initial.nowag import normalize
from benchmarks.evidence.traces import Trace

CLIP = 100.0
PROXIES = ("H", "H + diag H", "diag H", "paper", "H~", "G-H", "G-H~")


def token_weights(importance: Tensor, clip: float | None = CLIP) -> Tensor:
    """Importances as weights of mean 1, cut at ``clip`` times their mean first."""
    weights = importance.double() / importance.double().mean()
    if clip is not None:
        weights = weights.clamp(max=clip)
    return weights / weights.mean()


def mean_gram(inputs: list[Tensor], weights: Tensor | None = None) -> Tensor:
    """The mean over the tokens of w_t x_t x_t', (d_in, d_in) float64; products in float32, as in pruning."""
    parts = None if weights is None else weights.float().split([len(x) for x in inputs])
    total = torch.zeros(inputs[0].shape[1], inputs[0].shape[1], dtype=torch.float64)
    for index, x in enumerate(inputs):
        x = x.float()
        total += x.T @ (x if parts is None else parts[index][:, None] * x)
    return total / sum(len(x) for x in inputs)


def top_share(energy: Tensor, share: float = 0.01) -> float:
    """The part of the sum that the largest ``share`` of the entries hold, one entry at the least."""
    most = max(int(len(energy) * share), 1)
    return float(energy.double().topk(most).values.sum() / energy.double().sum())


@dataclass(frozen=True)
class Grams:
    """What the proxies of one layer are made of.

    Args:
        trace: of the layer.
    """

    trace: Trace

    @cached_property
    def importance(self) -> Tensor:
        """s_t of all tokens, not scaled."""
        return torch.cat(self.trace.importance)

    @cached_property
    def plain(self) -> Tensor:
        """H."""
        return mean_gram(self.trace.inputs)

    @cached_property
    def weighted(self) -> Tensor:
        """H~."""
        return self.reweighted(CLIP)

    def reweighted(self, clip: float | None) -> Tensor:
        """H~, its weights clipped elsewhere or not at all."""
        return mean_gram(self.trace.inputs, token_weights(self.importance, clip))

    def facts(self) -> dict[str, float]:
        """The mean importance, and what the top 1% of the tokens hold of tr H and tr H~."""
        energy = torch.cat([x.float().square().sum(1) for x in self.trace.inputs]).double()
        return {
            "importance": float(self.importance.double().mean()),
            "top tokens of H": top_share(energy),
            "top tokens of H~": top_share(energy * token_weights(self.importance)),
            "top tokens of H~, not clipped": top_share(energy * token_weights(self.importance, None)),
        }

    def energies(self, residual: Tensor, weight: Tensor) -> dict[str, float]:
        """Every proxy of R; at R = W it is what a relative loss divides by."""
        residual = residual.double()
        diagonal, output = self.plain.diagonal(), self.trace.output_gram
        plain, weighted = residual @ self.plain, residual @ self.weighted
        scales = normalize(weight.float())
        normalized = residual / scales.row.double()[:, None] / scales.column.double()
        found = {
            "H": (plain * residual).sum(),
            "diag H": (residual.square() * diagonal).sum(),
            "paper": (normalized.square() * diagonal).sum(),
            "H~": (weighted * residual).sum(),
            "G-H": (_left(output, residual) * plain).sum(),
            "G-H~": (_left(output, residual) * weighted).sum(),
        }
        found["H + diag H"] = found["H"] + found["diag H"]
        return {name: float(found[name]) for name in PROXIES}


def _left(blocks: Tensor, matrix: Tensor) -> Tensor:
    """diag(blocks) @ matrix."""
    return (blocks @ matrix.reshape(len(blocks), blocks.shape[1], -1)).reshape(matrix.shape)
