"""Every way to run a pruned layer, beside torch's dense linear in the same dtype."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from itertools import product

import torch
from torch import Tensor, nn

from armorfact_hf.layers.execution import STRATEGIES, Execution
from armorfact_hf.layers.strategies.strategy import PAIR, Kind
from benchmarks.execution import copies, dense_layers, random_layer
from benchmarks.gpu.parts import Item
from benchmarks.gpu.report import Labels, Skipped, Values
from benchmarks.gpu.setup import Setup, Shape, shape_name
from benchmarks.gpu.timer import Work, medians, timer_of

GRAPH_TOKENS = 64  # beyond, a GPU works longer on a layer than Python on its calls
LINEAR = "nn.Linear"
Forms = dict[str, list[nn.Module]]


def eager(strategy: str, setup: Setup) -> Iterator[Item]:
    """As PyTorch runs it call by call: for few tokens that may be the time that Python takes."""
    for dtype, shape in product(setup.dtypes, setup.shapes):
        made = _made(setup, strategy, dtype, shape)
        for tokens in setup.tokens:
            labels: Labels = {"layer": shape_name(shape), "dtype": dtype, "tokens": tokens}
            yield labels, partial(_times, setup, made, tokens, lambda work: work)


def graphs(setup: Setup) -> Iterator[Item]:
    """As CUDA graphs, where no call costs time: what servers do with few tokens."""
    strategies = sorted(STRATEGIES, key=lambda name: name == "unpacked")  # the likeliest to refuse capture comes last
    for strategy, dtype, shape in product(strategies, setup.dtypes[:1], setup.shapes):
        made = _made(setup, strategy, dtype, shape)
        for tokens in (count for count in setup.tokens if count <= GRAPH_TOKENS):
            labels: Labels = {"strategy": strategy, "layer": shape_name(shape), "dtype": dtype, "tokens": tokens}
            yield labels, partial(_times, setup, made, tokens, _captured)


def _made(setup: Setup, strategy: str, dtype: str, shape: Shape) -> Callable[[], Forms]:
    """Makes the copies of a layer when it is first called, and keeps them."""
    return cache(partial(_forms, setup, strategy, getattr(torch, dtype), shape))


def _forms(setup: Setup, strategy: str, dtype: torch.dtype, shape: Shape) -> Forms:
    """So many copies of nn.Linear, and of a pruned layer, that a pass over them comes from memory."""
    device = torch.device(setup.device)
    if reason := STRATEGIES[strategy].refusal(Kind(shape, PAIR, dtype, device)):
        raise Skipped(reason)
    count = max(2, setup.weights_bytes // (4 * shape[0] * shape[1]))
    layer = random_layer(*shape, setup.wrapper, dtype, device)
    return {
        LINEAR: dense_layers(*shape, count, dtype, device),
        strategy: copies(layer, count, Execution.always(strategy)),
    }


@torch.inference_mode()
def _times(setup: Setup, made: Callable[[], Forms], tokens: int, as_run: Callable[[Work], Work]) -> Values:
    """Microseconds a layer, and how many times as fast as nn.Linear the pruned one is."""
    forms = made()
    layers = forms[LINEAR]
    weight = layers[0].get_parameter("weight")  # (d_out, d_in)
    x = torch.randn(tokens, weight.shape[1], device=setup.device).to(weight.dtype)
    works: dict[str, Work] = {name: partial(_pass, group, x) for name, group in forms.items()}
    for work in works.values():
        work()  # compiles kernels, which no graph can hold
    found = medians(timer_of(setup.device), {name: as_run(work) for name, work in works.items()}, setup.seconds)
    dense, pruned = found.values()
    return {f"{name} µs": 1e6 * time / len(layers) for name, time in found.items()} | {"times as fast": dense / pruned}


def _pass(layers: Sequence[nn.Module], x: Tensor) -> None:
    for layer in layers:
        layer(x)


def _captured(work: Work) -> Work:
    if not torch.cuda.is_available():
        raise Skipped("CUDA graphs need a CUDA device")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay
