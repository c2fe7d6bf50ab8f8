"""How fast a pruned layer runs on this CPU, beside torch's dense linear in bfloat16 and float32.

    python -m benchmarks.execution
    python -m benchmarks.execution --shapes 4096x4096 --tokens 1 512

Random 2:4 cores between wrappers of random blocks; int8 is the core, between wrappers in bfloat16, and whole both in
int8. Each figure is the
median over passes through many copies of a layer, a gigabyte of dense float32 weights in all, so that weights come from
memory; the forms take turns in one run.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import torch
from torch import nn

from armorfact import BlockDiagonal, Core
from armorfact.steps.feedback import round_plainly
from armorfact_hf.bench.timing import time_side_by_side
from armorfact_hf.layers.execution import Execution
from armorfact_hf.layers.linear import FactorizedLinear
from armorfact_hf.layers.strategies.strategy import PAIR

SHAPES = ["4096x4096", "11008x4096", "2048x640", "1536x576"]
COPIES_BYTES = 1 << 30
# Strategy, dtype, that of the kept values, and that of the wrappers.
SPARSE = {
    f"{name} {strategy}": (strategy, *dtypes)
    for name, *dtypes in (
        ("bf16", torch.bfloat16, torch.bfloat16, torch.bfloat16),
        ("int8", torch.bfloat16, torch.int8, torch.bfloat16),
        ("whole", torch.bfloat16, torch.int8, torch.int8),
        ("fp32", torch.float32, torch.float32, torch.float32),
    )
    for strategy in ("packed", "unpacked")
}


def random_layer(
    d_out: int,
    d_in: int,
    block: int,
    dtype: torch.dtype,
    device: torch.device | None = None,
    core_dtype: torch.dtype | None = None,
    wrapper_dtype: torch.dtype | None = None,
) -> FactorizedLinear:
    """A layer of random factors; those in int8 are from -127 to 127."""
    weight = torch.randn(d_out, d_in, device=device)
    core = Core.from_dense((weight * PAIR.top_mask(weight.abs())).to(dtype), PAIR)
    if core_dtype == torch.int8:
        values = core.values.float()
        core = replace(core, values=(127 * values / values.abs().max()).round().to(torch.int8))
    wrappers = (torch.randn(d // block, block, block, device=device) / block**0.5 for d in (d_out, d_in))
    if wrapper_dtype == torch.int8:
        left, right = (round_plainly(blocks, dtype) for blocks in wrappers)
    else:
        left, right = (BlockDiagonal(blocks.to(dtype)) for blocks in wrappers)
    return FactorizedLinear.of(core, left, right)


def copies(layer: FactorizedLinear, count: int, execution: Execution) -> list[nn.Module]:
    """So many layers, each with memory of its own."""
    made = []
    for _ in range(count):
        other = FactorizedLinear.empty(layer.layout, False, layer.dtype, layer.values.device)
        other.load_state_dict(layer.state_dict())
        made.append(other.use_(execution))
    return made


def dense_layers(
    d_out: int, d_in: int, count: int, dtype: torch.dtype, device: torch.device | None = None
) -> list[nn.Module]:
    """So many dense layers, each with memory of its own."""
    made = (nn.Linear(d_in, d_out, bias=False, dtype=dtype, device=device) for _ in range(count))
    return [layer.requires_grad_(False) for layer in made]


@torch.inference_mode()
def measure(d_out: int, d_in: int, tokens: int, block: int) -> dict[str, float]:
    """Seconds of a layer by form; the input is in the dtype of each form."""
    count = max(2, COPIES_BYTES // (4 * d_out * d_in))
    x = torch.randn(tokens, d_in)
    forms: dict[str, list[nn.Module]] = {}
    for name, dtype in (("dense bf16", torch.bfloat16), ("dense fp32", torch.float32)):
        forms[name] = [_Cast(layer, dtype) for layer in dense_layers(d_out, d_in, count, dtype)]
    for name, (strategy, dtype, *whole) in SPARSE.items():
        layer = random_layer(d_out, d_in, block, dtype, None, *whole)
        forms[name] = [_Cast(made, dtype) for made in copies(layer, count, Execution.always(strategy))]
    return time_side_by_side(forms, x)


class _Cast(nn.Module):
    """A layer whose input is cast once, before the clock of any other runs."""

    def __init__(self, layer: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.layer, self.dtype, self.inputs = layer, dtype, {}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        key = x.data_ptr()
        if key not in self.inputs:
            self.inputs[key] = x.to(self.dtype)
        return self.layer(self.inputs[key])


def main() -> None:
    """Print a line a shape and number of tokens."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=SHAPES)
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 512])
    parser.add_argument("--block", type=int, default=128, help="of the wrappers; halved until it divides the sizes")
    arguments = parser.parse_args()
    names = ["dense bf16", "dense fp32", *SPARSE]
    columns = ["layer", "block", "tokens", *(f"{name} µs" for name in names)]
    print(f"| {' | '.join(columns)} | dense / sparse: bf16, fp32; bf16 / int8, whole |")
    print("|" + "---|" * (len(names) + 4))
    for shape in arguments.shapes:
        d_out, d_in = map(int, shape.split("x"))
        block = arguments.block
        while d_out % block or d_in % block:
            block //= 2
        for tokens in arguments.tokens:
            found = measure(d_out, d_in, tokens, block)
            dense = min(found["dense bf16"], found["dense fp32"])
            half = min(found["bf16 packed"], found["bf16 unpacked"])
            full = min(found["fp32 packed"], found["fp32 unpacked"])
            cells = " | ".join(f"{found[name] * 1e6:,.0f}" for name in names)
            int8 = (half / min(found[f"{name} packed"], found[f"{name} unpacked"]) for name in ("int8", "whole"))
            ratios = f"{dense / half:.2f}, {found['dense fp32'] / full:.2f}; {', '.join(f'{x:.2f}' for x in int8)}"
            print(f"| {shape} | {block} | {tokens} | {cells} | {ratios} |", flush=True)


if __name__ == "__main__":
    main()
