"""Measure how fast the pruned experts of a model run, beside the dense ones as transformers runs them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from armorfact_hf.bench.timing import DENSE_BYTES, Timing, time_side_by_side
from armorfact_hf.layers.experts import FactorizedExperts
from armorfact_hf.model.dense_experts import dense_experts

AS_STORED = "experts"  # the one way to run them: it chooses for itself by the number of tokens


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


@torch.inference_mode()
def _time_group(shape: str, modules: list[FactorizedExperts], tokens: int) -> Timing:
    first, (d_out, d_in) = modules[0], modules[0].stacks["up"].layout.shape
    held = first.stacks["up"].values
    size = first.num_experts * len(first.stacks) * d_out * d_in * held.element_size()
    modules = modules[: max(1, DENSE_BYTES // size)]
    chosen = torch.rand(tokens, first.num_experts, device=held.device).topk(_top(first)).indices
    weights = torch.full(chosen.shape, 1 / chosen.shape[1], dtype=held.dtype, device=held.device)
    x = torch.randn(tokens, d_in, device=held.device).to(held.dtype)
    forms = {
        "dense": [_Routed(dense_experts(experts), chosen, weights) for experts in modules],
        AS_STORED: [_Routed(experts, chosen, weights) for experts in modules],
    }
    seconds = time_side_by_side(forms, x)
    return Timing(shape, tokens, len(modules), seconds["dense"], seconds, 0.0)
