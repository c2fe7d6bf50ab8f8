"""How fast pruned experts run on this CPU, beside the dense ones by every way that transformers has for a CPU.

    python -m benchmarks.expert_speed
    python -m benchmarks.expert_speed --experts 8 --top 2 --inner 4096 --tokens 1 64

Random 2:4 cores between wrappers of random blocks, in a gated experts module as Mixtral has it; the dense weights are
their products A C B. Tokens choose experts at random. Each figure is the median over passes; the forms take turns in
one run. "batched_mm" copies the weights for each token, and is left out where that takes more than a gigabyte.
"""

from __future__ import annotations

import argparse
import time

import torch
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from armorfact_hf.bench.experts import AS_STORED, seconds_by_form
from armorfact_hf.layers.experts import FactorizedExperts
from armorfact_hf.layers.format import LayerFormat
from armorfact_hf.layers.routed import Gating
from armorfact_hf.layers.stack import FactorizedStack
from armorfact_hf.layers.strategies.strategy import PAIR

BYTES_OF_POSITIONS = [0x44, 0x48, 0x4C, 0x89, 0x8D, 0xCE]  # two groups of two columns each


def random_experts(
    experts: int, top: int, width: int, inner: int, block: int | None, dtype: torch.dtype
) -> FactorizedExperts:
    """An experts module of random factors."""
    config = MixtralConfig(
        hidden_size=width, intermediate_size=inner, num_local_experts=experts, num_experts_per_tok=top
    )
    with torch.device("meta"):
        gating = Gating(MixtralExperts(config))
    shapes = {"gate": (inner, width), "up": (inner, width), "down": (width, inner)}
    return FactorizedExperts({name: _stack(experts, shape, block, dtype) for name, shape in shapes.items()}, gating)


def _stack(experts: int, shape: tuple[int, int], block: int | None, dtype: torch.dtype) -> FactorizedStack:
    blocks = None if block is None else (block, block)
    stack = FactorizedStack(LayerFormat("experts", shape, PAIR, blocks, experts), bias=False, dtype=dtype)
    scales = {"values": shape[1] ** -0.5, "left": (block or 1) ** -0.5, "right": (block or 1) ** -0.5}
    for name, parameter in stack.named_parameters():
        parameter.normal_(std=scales[name])
    codes = torch.tensor(BYTES_OF_POSITIONS, dtype=torch.uint8)
    stack.positions.copy_(codes[torch.randint(len(codes), stack.positions.shape)])
    return stack


def row(experts: int, top: int, tokens: int, seconds: dict[str, float]) -> str:
    """A line of the table."""
    dense = {name: value for name, value in seconds.items() if name != AS_STORED}
    fastest = min(dense, key=dense.__getitem__)
    cells = [f"{top} of {experts}", tokens, f"{dense[fastest] * 1e6:,.0f}", fastest]
    cells += [f"{seconds[AS_STORED] * 1e6:,.0f}", f"{dense[fastest] / seconds[AS_STORED]:.2f}"]
    return "| " + " | ".join(map(str, cells)) + " |"


@torch.no_grad()
def main() -> None:
    """Print a line a number of tokens."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--top", type=int, default=8, help="experts that a token goes to")
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--inner", type=int, default=1024)
    parser.add_argument("--block", type=int, default=128, help="of the wrappers; 0 is none")
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 8, 64, 512])
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--processor", action="store_true", help="the processor's time, for one thread beside others")
    args = parser.parse_args()
    torch.manual_seed(0)
    clock = time.process_time if args.processor else time.perf_counter
    dtype: torch.dtype = getattr(torch, args.dtype)
    made = random_experts(args.experts, args.top, args.width, args.inner, args.block or None, dtype)
    print("| experts | tokens | dense µs | its form | pruned µs | dense / pruned |\n|---|---|---|---|---|---|")
    for tokens in args.tokens:
        print(row(args.experts, args.top, tokens, seconds_by_form([made], tokens, clock)), flush=True)


if __name__ == "__main__":
    main()
