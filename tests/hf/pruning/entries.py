"""Entries of a journal that were not computed."""

from __future__ import annotations

import torch

from armorfact_hf.layers.linear import FactorizedLinear
from armorfact_hf.pruning.layer import LayerReport
from armorfact_hf.pruning.resume.entry import Finished

MANIFEST = {"config.pattern": "2:4", "model": "5e", "layers": ["a.b", "a.c"]}
D_OUT, D_IN, BLOCK = 8, 16, (4, 8)


def finished(seed: int = 0, bias: bool = True) -> Finished:
    """A decoder block of two random pruned layers."""
    source = torch.Generator().manual_seed(seed)
    layers = []
    for name in ("a.b", "a.c"):
        layer = FactorizedLinear(D_OUT, D_IN, block=BLOCK, bias=bias, dtype=torch.bfloat16)
        floats = {part: torch.randn(x.shape, generator=source) for part, x in layer.state_dict().items()}
        floats["positions"] = torch.full_like(layer.positions, 0b0100_0100)  # the first two of each group
        layer.load_state_dict(floats)
        report = LayerReport(
            name, 0, (D_OUT, D_IN), BLOCK, {"armorfact": 0.1}, 0.1, 0.2, 3, 0.5, 256, 160, 96, "converged", ("a note",)
        )
        layers.append((layer, report))
    return Finished(layers, 1.5)


def same(first: Finished, second: Finished) -> bool:
    return first.seconds == second.seconds and all(
        report == other and layer.state_dict().keys() == state.state_dict().keys() and all(
            torch.equal(x, state.state_dict()[part]) for part, x in layer.state_dict().items()
        )
        for (layer, report), (state, other) in zip(first.layers, second.layers, strict=True)
    )  # fmt: skip
