"""The output side of a layer's objective: perplexity where tr(G R H R') is minimized instead of tr(R H R').

G is the mean of g g' in blocks on the diagonal, those of A, with g as in `armorfact_hf.pruning.prices`. Every third
decoder block is pruned, layers alone, in 10 sweeps.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor

from armorfact_hf.data.calibration import Calibration
from armorfact_hf.observer import Observer
from armorfact_hf.pruning.config import PruneConfig
from armorfact_hf.pruning.prices import fisher_samples
from armorfact_hf.pruning.progress import Progress
from armorfact_hf.pruning.side_by_side import Keep, forget, prune_layers
from benchmarks.evidence.tables import kind, table
from benchmarks.evidence.traces import block_gram
from benchmarks.evidence.whole import factorizing
from benchmarks.kept import kept
from benchmarks.prices import job_of
from benchmarks.results import dense_figures
from benchmarks.shared.quality import measure, quality_table
from benchmarks.shared.sharing import Pruned, Work, pruned_by

EVERY = 3


@dataclass(frozen=True)
class Form:
    """How G is damped, and where it is used.

    Args:
        mean: times the mean of all its diagonal, added there. own: times its own diagonal. kinds: of layers; () is all.
    """

    mean: float = 0.0
    own: float = 0.0
    kinds: tuple[str, ...] = ()

    def damped(self, gram: Tensor) -> Tensor:
        """G in units of its mean diagonal, (blocks, size, size)."""
        scaled = gram / gram.diagonal(dim1=1, dim2=2).mean()
        # An output that no word depends on must not make G singular.
        own = scaled.diagonal(dim1=1, dim2=2).clamp_min(1e-3)
        return scaled + torch.diag_embed(self.mean + self.own * own)


QUERY_AND_KEY, GATE_AND_UP = ("q_proj", "k_proj"), ("gate_proj", "up_proj")
FORMS = {
    "H": None,
    "G-H, its diagonal added": Form(own=1.0),
    "G-H, hardly damped": Form(mean=0.02),
    "G-H of q, k and v": Form(mean=0.02, kinds=(*QUERY_AND_KEY, "v_proj")),
    "G-H of q, k, gate and up, its diagonal added": Form(own=1.0, kinds=(*QUERY_AND_KEY, *GATE_AND_UP)),
    "G-H of q, k, gate and up, hardly damped": Form(mean=0.02, kinds=(*QUERY_AND_KEY, *GATE_AND_UP)),
    "G-H of gate and up, its diagonal added": Form(own=1.0, kinds=GATE_AND_UP),
    "G-H of q and k, hardly damped": Form(mean=0.02, kinds=QUERY_AND_KEY),
}


def output_grams(model: str, calibration: Calibration) -> dict[str, Tensor]:
    """G by layer, (blocks, size, size) float64, of the decoder blocks that are pruned."""
    found = {}
    for one in fisher_samples(job_of(model, EVERY, calibration), Progress(Observer(), 0), None):
        if one.layer.block is not None:
            found[one.layer.name] = output_gram(one.gradients, one.layer.block[0])
    return found


def output_gram(gradients: Tensor, size: int) -> Tensor:
    """The mean of g g' on the rows of each block of A, (blocks, size, size) float64.

    Args:
        gradients: g, (tokens, d_out). size: of the blocks.
    """
    return block_gram(gradients.float(), size).double() / len(gradients)


def weighing(grams: Mapping[str, Tensor], form: Form | None) -> AbstractContextManager:
    """Inside, `prune_` minimizes tr(G R H R') for the form's kinds of layers; no setting of it asks for that."""
    wanted = {name for name in grams if form and (not form.kinds or kind(name) in form.kinds)}

    def prune(work: Work, config: PruneConfig, keep: Keep = forget, each: int | None = None) -> list[Pruned]:
        found = []
        for layer, moments in work:
            weights = form.damped(grams[layer.name]) if form and layer.name in wanted else None
            with factorizing(output_gram=weights):
                found += prune_layers([(layer, moments)], config, keep, each)
        return found

    return pruned_by(prune)


def correlations(grams: Mapping[str, Tensor]) -> dict[str, float]:
    """By kind of layer, how far outputs of one block move together: the mean size of the correlations in G."""
    found: dict[str, list[float]] = {}
    for name, gram in grams.items():
        size = gram.diagonal(dim1=1, dim2=2).clamp_min(torch.finfo(gram.dtype).tiny).sqrt()
        between = ~torch.eye(gram.shape[1], dtype=torch.bool).expand_as(gram)
        every = (gram / size[:, :, None] / size[:, None, :]).abs()[between]
        found.setdefault(kind(name), []).append(float(every.mean()))
    return {name: fmean(values) for name, values in found.items()}


def output_table(model: str, out: Path, calibration: Calibration | None = None) -> str:
    """A line a form, then the correlations in G; figures are kept in ``out``."""
    calibration = Calibration() if calibration is None else calibration
    grams = cache(partial(output_grams, model, calibration))
    key = [model, asdict(calibration)]

    def measured(form: Form | None) -> dict:
        return measure(model, EVERY, calibration, weighing(grams() if form else {}, form), None)

    found = {label: kept(out, "outputs", [label, *key], partial(measured, form)) for label, form in FORMS.items()}
    together = kept(out, "correlations", key, lambda: correlations(grams()))
    row = ["mean correlation", *(f"{value:.3f}" for value in together.values())]
    return f"{quality_table(found, dense_figures(model, out))}\n\n{table(['', *together], [row])}"
