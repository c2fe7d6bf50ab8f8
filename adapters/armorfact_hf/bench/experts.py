"""Measure how fast the pruned experts of a model run, beside the dense ones as transformers runs them."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from armorfact_hf.bench.timing import DENSE_BYTES, Clock, Timing, time_side_by_side
from armorfact_hf.layers.experts import FactorizedExperts
from armorfact_hf.model.dense_experts import dense_experts

AS_STORED = "experts"  # the one way to run them: it chooses for itself by the number of tokens
RIVALS = ("eager", "grouped_mm", "batched_mm")  # of transformers, which need nothing to be installed


class _Routed(nn.Module):
    """Experts, called with a router's choice: uniform, since it only says how many experts are hit."""

    def __init__(self, experts: nn.Module, chosen: Tensor, weights: Tensor) -> None:
        super().__init__()
        self.experts, self.chosen, self.weights = experts, chosen, weights

    def forward(self, x: Tensor) -> Tensor:
        return self.experts(x, self.chosen, self.weights)


def time_experts(model: nn.Module, tokens: Sequence[int]) -> list[Timing]:
    """Time all experts modules of a model that are alike, at each number of tokens.

    Args:
        model: on the device and in the dtype to measure. tokens: numbers of rows in the input, each at least 1.
    """
    groups: dict[str, list[FactorizedExperts]] = {}
    for module in model.modules():
        if isinstance(module, FactorizedExperts):
            groups.setdefault(_shape(module), []).append(module)
    return [_time_group(shape, modules, n) for shape, modules in groups.items() for n in sorted(set(tokens))]


def _shape(experts: FactorizedExperts) -> str:
    d_out, d_in = experts.stacks["up"].layout.shape
    return f"{_top(experts)} of {experts.num_experts} experts, {d_out}x{d_in}"


def _top(experts: FactorizedExperts) -> int:
    """How many experts a token goes to; 1 where the model's config does not say it by the usual name."""
    return getattr(experts.gating.module.config, "num_experts_per_tok", None) or 1


def _time_group(shape: str, modules: list[FactorizedExperts], tokens: int) -> Timing:
    modules = modules[: max(1, DENSE_BYTES // _dense_bytes(modules[0]))]
    found = seconds_by_form(modules, tokens)
    dense = min(seconds for name, seconds in found.items() if name != AS_STORED)
    return Timing(shape, tokens, len(modules), dense, {"dense": dense, AS_STORED: found[AS_STORED]}, None)


def _dense_bytes(experts: FactorizedExperts) -> int:
    d_out, d_in = experts.stacks["up"].layout.shape
    itemsize = experts.stacks["up"].dtype.itemsize
    return experts.num_experts * len(experts.stacks) * d_out * d_in * itemsize


@torch.inference_mode()
def seconds_by_form(
    modules: Sequence[FactorizedExperts], tokens: int, clock: Clock = time.perf_counter
) -> dict[str, float]:
    """Median seconds of one of some experts modules that are alike, by form: `AS_STORED` and `RIVALS`.

    "batched_mm" copies the weights of an expert for each token; it is left out where that takes more than a gigabyte.

    Args:
        tokens: the number of rows in the input, each for as many experts as the model's config says.
        clock: as for `time_side_by_side`.
    """
    first, top = modules[0], _top(modules[0])
    held, dtype, d_in = first.stacks["up"].values, first.stacks["up"].dtype, first.stacks["up"].layout.shape[1]
    chosen = torch.rand(tokens, first.num_experts, device=held.device).topk(top).indices
    weights = torch.full(chosen.shape, 1 / top, dtype=dtype, device=held.device)
    x = torch.randn(tokens, d_in, device=held.device).to(dtype)
    dense = [dense_experts(experts) for experts in modules]
    forms = {AS_STORED: [_Routed(experts, chosen, weights) for experts in modules]}
    for name in RIVALS:
        if name != "batched_mm" or tokens * top * _dense_bytes(first) <= first.num_experts * DENSE_BYTES:
            forms[name] = [_Routed(_run_by(name, experts), chosen, weights) for experts in dense]
    return time_side_by_side(forms, x, clock)


def _run_by(name: str, experts: nn.Module) -> nn.Module:
    """The same experts, run by one of transformers' implementations."""
    other: Any = copy.copy(experts)
    other.config = copy.copy(other.config)
    other.config._experts_implementation = name
    return other
