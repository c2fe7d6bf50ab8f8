"""Measure how fast each distinct pruned layer of a model runs by each strategy, and choose.

A layer is timed together with all others of its shape, one after another as in a forward pass, so that its weight comes
from memory and not from a cache that a loop over one layer would warm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from math import isqrt
from pathlib import Path
from typing import cast

import torch
from torch import nn

from armorfact_hf.bench.experts import time_experts
from armorfact_hf.bench.timing import DENSE_BYTES, Timing, time_side_by_side
from armorfact_hf.checkpoint.folder import describe_folder
from armorfact_hf.checkpoint.measured import shape_key, write_measured
from armorfact_hf.data.load_model import load_model
from armorfact_hf.layers.execution import STRATEGIES, Execution, runnable
from armorfact_hf.layers.linear import FactorizedLinear
from armorfact_hf.layers.parts import PARTS


def time_layers(
    model: nn.Module, tokens: Sequence[int], progress: Callable[[str, int, int], object] | None = None
) -> list[Timing]:
    """Time every distinct pruned layer of a model at each number of tokens, by every strategy that can run.

    Args:
        model: on the device and in the dtype to measure. tokens: numbers of rows in the input, each at least 1.
        progress: called with what is done, how far, and of how much.

    Raises:
        ValueError: the model holds no pruned layer, or a number of tokens below 1.
    """
    if not tokens or min(tokens) < 1:
        raise ValueError(f"expected numbers of tokens of at least 1, got {list(tokens)}")
    groups = _by_shape(model)
    if not groups:
        raise ValueError("the model holds no pruned layer: name a folder that `armorfact prune` wrote")
    steps = [(shape, count) for shape in groups for count in sorted(set(tokens))]
    timings = []
    for done, (shape, count) in enumerate(steps):
        if progress is not None:
            progress(f"{shape}, {count} tokens", done, len(steps))
        timings.append(_time_group(shape, groups[shape], count))
    return timings


def _by_shape(model: nn.Module) -> dict[str, list[FactorizedLinear]]:
    groups: dict[str, list[FactorizedLinear]] = {}
    for module in model.modules():
        if isinstance(module, FactorizedLinear):
            groups.setdefault(shape_key(module), []).append(module)
    return groups


@torch.inference_mode()
def _time_group(shape: str, layers: list[FactorizedLinear], tokens: int) -> Timing:
    first = layers[0]
    size = first.out_features * first.in_features * first.dtype.itemsize
    layers = layers[: max(1, DENSE_BYTES // size)]
    x = torch.randn(tokens, first.in_features, device=first.values.device).to(first.dtype)
    forms: dict[str, Sequence[nn.Module]] = {"dense": [_dense(layer) for layer in layers]}
    for strategy in (name for name in runnable(first.kind) if name != "dense"):
        forms[strategy] = [_sharing(layer).use_(Execution.always(strategy)) for layer in layers]
    seconds = time_side_by_side(forms, x)
    sparse = min((name for name in seconds if name != "dense"), key=seconds.__getitem__)
    wrappers = 0.0
    if first.block is not None:
        alone = time_side_by_side({"whole": forms[sparse], "bare": [_Bare(layer) for layer in forms[sparse]]}, x)
        wrappers = max(0.0, 1 - alone["bare"] / alone["whole"])
    return Timing(shape, tokens, len(layers), seconds["dense"], seconds, wrappers)


def _dense(layer: FactorizedLinear) -> nn.Linear:
    with torch.device("meta"):
        dense = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
    dense.weight = nn.Parameter(layer.weight, requires_grad=False)
    dense.register_parameter("bias", layer.bias)
    return dense


class _Bare(nn.Module):
    """A layer without its wrappers, which an int8 core cannot be stored without."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = cast(FactorizedLinear, layer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        values, positions, _, _, merged, compressed, *_ = self.layer.tensors
        shape = self.layer.pattern.keep, self.layer.pattern.group, self.layer.choice
        y = torch.ops.armorfact.factorized_linear(x, values, positions, None, None, merged, compressed, *shape)
        return y if self.layer.bias is None else y + self.layer.bias


def _sharing(layer: FactorizedLinear) -> FactorizedLinear:
    """A layer of the same tensors."""
    with torch.device("meta"):
        other = FactorizedLinear.empty(layer.layout, layer.bias is not None, layer.dtype)
    for name in PARTS:
        setattr(other, name, getattr(layer, name))
    return other


def choose(timings: Sequence[Timing], allow_dense: bool = False) -> dict[str, Execution]:
    """For each shape the fastest strategy by number of tokens; the border between two is their geometric mean.

    Args:
        timings: of `time_layers`. allow_dense: whether a layer may keep its merged weight beside the factors.
    """
    return {
        shape: Execution(tuple(_ranges(found, allow_dense)))
        for shape, found in _of_shapes(timings)
        if set(found[0].seconds) <= set(STRATEGIES)  # experts choose for themselves
    }


def _of_shapes(timings: Sequence[Timing]) -> Iterator[tuple[str, list[Timing]]]:
    for shape in dict.fromkeys(timing.shape for timing in timings):
        yield shape, sorted((timing for timing in timings if timing.shape == shape), key=lambda found: found.tokens)


def _ranges(timings: list[Timing], allow_dense: bool) -> Iterator[tuple[int | None, str]]:
    for timing, following in zip(timings, [*timings[1:], None], strict=True):
        strategy = timing.fastest(allow_dense)
        if following is None:
            yield None, strategy
        elif following.fastest(allow_dense) != strategy:
            yield isqrt(timing.tokens * following.tokens), strategy


def crossover(timings: Sequence[Timing]) -> dict[str, int | None]:
    """For each shape the largest measured number of tokens up to which a sparse strategy is faster than dense.

    None where dense is faster from the first number on.
    """
    found: dict[str, int | None] = {}
    for shape, group in _of_shapes(timings):
        found[shape] = None
        for timing in group:
            if timing.fastest() == "dense":
                break
            found[shape] = timing.tokens
    return found


def bench_folder(
    folder: Path | str,
    tokens: Sequence[int],
    *,
    dtype: str = "auto",
    device: str | None = None,
    allow_dense: bool = False,
    progress: Callable[[str, int, int], object] | None = None,
    log: Callable[[str], None] = print,
) -> list[Timing]:
    """`time_layers` on a pruned folder; the choice is written beside the checkpoint, where loading finds it.

    Raises:
        ValueError: the folder holds no pruned model, or is damaged.
    """
    folder = Path(folder)
    describe_folder(folder)
    model = load_model(str(folder), dtype, device, log).model
    timings = time_layers(model, tokens, progress) if _by_shape(model) else []
    found = timings + time_experts(model, tokens)
    if not found:
        raise ValueError(f"{folder} holds no pruned layer: name a folder that `armorfact prune` wrote")
    write_measured(folder, model.device, model.dtype, choose(timings, allow_dense))
    return found
