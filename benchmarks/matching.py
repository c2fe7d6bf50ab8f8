"""How far tuning brings a decoder block, by the optimizer: Muon over tiles, over whole factors, and AdamW.

    python -m benchmarks.matching --model demo:smollm2 --blocks 8 20

Each of the blocks is pruned alone in the dense model, layers factorized as by default and then tuned in as many steps;
printed is the relative error of its output on the windows kept aside, before and after, in the dtype that is stored.
Rates are shares of the size of factors for all of them. The processor's seconds are those of both.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from armorfact_hf.data.calibration import Calibration
from armorfact_hf.data.load_model import load_model
from armorfact_hf.pruning.config import PruneConfig
from armorfact_hf.pruning.prune import prune_
from armorfact_hf.pruning.tuning import matching, muon
from armorfact_hf.pruning.tuning.muon import Muon
from benchmarks.evidence.tables import table

WHOLE = 2**20  # a tile as large as any factor


class AdamW(Muon):
    """PyTorch's, with the betas of language models and no decay."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        super().__init__(parameters)
        groups = [{"params": [parameter], "unit": self.units[name]} for name, parameter in parameters.items()]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0)

    @torch.no_grad()
    def step_(self, rate: float) -> None:
        for name, parameter in self.parameters.items():
            self.before[name].copy_(parameter)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["unit"]
        self.optimizer.step()


FORMS: dict[str, tuple[Callable[..., Muon], int]] = {
    "AdamW": (AdamW, muon.TILE),
    "Muon": (Muon, muon.TILE),
    "Muon, tiles of 16": (Muon, 16),
    "Muon, whole factors": (Muon, WHOLE),
}


@contextmanager
def tuned_by(optimizer: Callable[..., Muon], tile: int) -> Iterator[None]:
    """Inside, decoder blocks are tuned so; no setting of the adapters names it."""
    before = matching.Muon, muon.TILE
    matching.Muon, muon.TILE = optimizer, tile
    muon._side.cache_clear()
    try:
        yield
    finally:
        matching.Muon, muon.TILE = before
        muon._side.cache_clear()


def tuned(model: str, block: int, config: PruneConfig, form: str) -> tuple[float, float, float]:
    """The block's error before and after, and the processor's seconds."""
    loaded = load_model(model, "bfloat16", "cpu", log=lambda _: None)  # whose seconds the processor's are
    tokens = Calibration().tokens(loaded, lambda _: None)
    start = time.process_time()
    with tuned_by(*FORMS[form]):
        [report] = prune_(loaded.model, tokens, config).blocks
    return report.before, report.after, time.process_time() - start


def main() -> None:
    """Print a table with a line for each optimizer and rate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo:smollm2")
    parser.add_argument("--blocks", nargs="+", type=int, default=[8, 20])
    parser.add_argument("--rates", nargs="+", type=float, default=[PruneConfig().rate])
    parser.add_argument("--forms", default=";".join(FORMS), help="separated by semicolons")
    arguments = parser.parse_args()
    rows = []
    for form in arguments.forms.split(";"):
        for rate in arguments.rates:
            cells, spent = [], 0.0
            for block in arguments.blocks:
                config = PruneConfig(include=(f"re:.*layers\\.{block}\\..*",), baselines=(), tail=0, rate=rate)
                before, after, seconds = tuned(arguments.model, block, config, form)
                cells, spent = [*cells, f"{before:.4f} to {after:.4f} ({1 - after / before:.1%})"], spent + seconds
            rows.append([form, f"{rate}", *cells, f"{spent:.0f}"])
            print(rows[-1], flush=True)
    print(table(["", "rate", *(f"block {block}" for block in arguments.blocks), "seconds"], rows))


if __name__ == "__main__":
    main()
