"""The ways to prune a layer that are compared: methods, objectives, and amounts of work. Each gives a dense weight."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from armorfact import BlockDiagonal, Result, factorize
from armorfact.solvers import Solver
from armorfact_hf.pruning.config import PruneConfig
from armorfact_hf.pruning.fitting import fitting_block
from armorfact_hf.pruning.layer import shrunk
from armorfact_hf.pruning.losses import one_shot
from benchmarks.evidence.one_pass import OnePass
from benchmarks.evidence.proxies import Grams
from benchmarks.results import PAPER

CONFIG = PruneConfig()
OURS = "armorfact"


@dataclass(frozen=True)
class Subject:
    """A layer to prune.

    Args:
        weight: W, (d_out, d_in).
        grams: of its inputs and outputs.
    """

    weight: Tensor
    grams: Grams

    @cached_property
    def block(self) -> tuple[int, int] | None:
        """The blocks of its wrappers."""
        return fitting_block(tuple(self.weight.shape), CONFIG)[0]

    def ours(self, gram: Tensor, sweeps: int = CONFIG.sweeps, rtol: float = CONFIG.rtol, **changes) -> Result:
        """W factorized as the adapters do it, with another Gram matrix or other changes."""
        given = shrunk(gram, CONFIG.diagonal_weight).float()
        return factorize(self.weight.float(), given, block=self.block, max_sweeps=sweeps, rtol=rtol, **changes)


Method = Callable[[Subject], Tensor]


def _one_shot(name: str) -> Method:
    return lambda subject: one_shot(name, subject.weight.float(), subject.grams.plain, CONFIG.pattern)


def _paper(subject: Subject) -> Tensor:
    """The ARMOR paper's objective, solved until three sweeps each gain less than a thousandth, as in `results`."""
    diagonal = subject.grams.plain.diagonal().float()
    how = {"init": PAPER["init"], "max_sweeps": PAPER["sweeps"], "rtol": PAPER["rtol"]}
    return factorize(subject.weight.float(), diagonal, block=subject.block, normalize="nowag", **how).dense()


METHODS: dict[str, Method] = {
    **{name: _one_shot(name) for name in ("magnitude", "wanda", "nowag", "sparsegpt")},
    "paper": _paper,
    OURS: lambda subject: subject.ours(subject.grams.plain).dense(),
}


def _token_weighted(share: float, clipped: bool) -> Method:
    def prune(subject: Subject) -> Tensor:
        weighted = subject.grams.weighted if clipped else subject.grams.reweighted(None)
        return subject.ours(torch.lerp(subject.grams.plain, weighted, share)).dense()

    return prune


def _output_weighted(weighted: bool) -> Method:
    return lambda subject: output_weighted(subject, subject.grams.weighted if weighted else subject.grams.plain)


def output_weighted(subject: Subject, gram: Tensor, damping: float = 0.01) -> Tensor:
    """The minimizer of tr(G R H R'), as that of tr(V H V') for V = L'R, G = L L' in blocks on A's own.

    The start is SparseGPT's core of W between A = L' and B = I, which is that core in the coordinates of V.
    """
    blocks = subject.grams.trace.output_gram
    scale = blocks.diagonal(dim1=1, dim2=2).mean()
    eye = torch.eye(blocks.shape[1], dtype=torch.float64)
    root = torch.linalg.cholesky(blocks / scale + damping * eye).mT.contiguous()
    start = subject.ours(gram, sweeps=0)
    start = replace(start, left=BlockDiagonal((root @ start.left.blocks.double()).float()))
    rows = subject.weight.double().reshape(len(root), root.shape[1], -1)
    turned = Subject((root @ rows).reshape(subject.weight.shape), subject.grams)
    found = turned.ours(gram, init=start).dense().double().reshape(rows.shape)
    return torch.linalg.solve(root, found).reshape(subject.weight.shape).float()


OBJECTIVES: dict[str, Method] = {
    OURS: METHODS[OURS],
    "H~, 0.5": _token_weighted(0.5, True),
    "H~, 1": _token_weighted(1.0, True),
    "H~, 0.5, not clipped": _token_weighted(0.5, False),
    "H~, 1, not clipped": _token_weighted(1.0, False),
    "G-H": _output_weighted(False),
    "G-H~": _output_weighted(True),
}


def _swept(sweeps: int, solver: str | Solver = "exact") -> Method:
    return lambda subject: subject.ours(subject.grams.plain, sweeps=sweeps, rtol=0.0, solver=solver).dense()


SWEEPS: dict[str, Method] = {
    "sparsegpt": METHODS["sparsegpt"],
    "one pass": _swept(1, OnePass()),
    **{f"{count} sweeps": _swept(count) for count in (1, 5, 20, 100)},
}
