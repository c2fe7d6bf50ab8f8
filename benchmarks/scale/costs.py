"""What the work on one decoder block costs, measured on one whose widths are those of Llama 70B over `SHRINK`."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from armorfact_hf.model.moments import Statistics, add_gram_
from armorfact_hf.model.stream import BlockStream, frozen
from armorfact_hf.pruning.config import PruneConfig
from armorfact_hf.pruning.job import Job, make_job
from armorfact_hf.pruning.layer import prune_layer
from armorfact_hf.pruning.schedule import Matching
from armorfact_hf.pruning.states import States
from armorfact_hf.pruning.tuning.aims import StateAim
from armorfact_hf.pruning.tuning.matching import match_block_

SHRINK = 8
HIDDEN, INNER, HEADS, KEY_HEADS = 8192, 28672, 64, 8  # Llama 70B
PASSES = (1, 2)  # over the windows of a short block matching, and of a longer one
WINDOWS = 4

T = TypeVar("T")


@dataclass(frozen=True)
class LayerCost:
    """Seconds that a layer takes.

    Args:
        shape: (d_out, d_in). leader: the layer that has its Gram matrix.
        gram: of one window, 0 if another layer has it. prune: of the whole layer.
    """

    shape: tuple[int, int]
    leader: str
    gram: float
    prune: float


@dataclass(frozen=True)
class Costs:
    """Seconds on a worker.

    Args:
        machine: one thread of which is a worker. length: of the windows, in tokens.
        forward: a window through the block. tuning: a step of block matching.
        layers: of the block, by name.
    """

    machine: str
    length: int
    forward: float
    tuning: float
    layers: dict[str, LayerCost]

    @classmethod
    def read(cls, path: Path) -> Costs:
        """What `write` wrote."""
        values = json.loads(path.read_text(encoding="utf-8"))
        layers = {name: LayerCost(**{**x, "shape": tuple(x["shape"])}) for name, x in values["layers"].items()}
        return cls(**{**values, "layers": layers})

    def write(self, path: Path) -> None:
        """Keep them in a file."""
        path.write_text(json.dumps(asdict(self), indent=2), encoding="utf-8")

    def enlarged(self, faster: float) -> Costs:
        """Those of the large model, on workers so many times as fast."""
        square, cube = SHRINK**2 / faster, SHRINK**3 / faster
        layers = {
            name: LayerCost((x.shape[0] * SHRINK, x.shape[1] * SHRINK), x.leader, x.gram * square, x.prune * cube)
            for name, x in self.layers.items()
        }
        return replace(self, forward=self.forward * square, tuning=self.tuning * square, layers=layers)


def measure(length: int) -> Costs:
    """The costs on this machine, by a worker of one thread: in processor time, which other work hardly changes."""
    torch.set_num_threads(1)
    job = _small_job(length)
    states = States.before_the_first(BlockStream(job.model, job.blocks), job.prefix, job.tokens.split(1))
    modules = {layer.name: layer.module for layer in job.layers}
    _, inputs = _timed(lambda: states.inputs(0, 0, modules, advance=False))  # warms up
    forward, _ = _timed(lambda: states.inputs(0, 0, {}, advance=False))
    statistics = Statistics()
    statistics.add(inputs)
    layers = {layer.name: _layer_cost(layer, inputs.tensors, statistics, job) for layer in job.layers}
    return Costs(_processor(), length, forward, _tuning(job, states, statistics), layers)


def _layer_cost(layer: Any, tensors: dict[str, torch.Tensor], statistics: Statistics, job: Job) -> LayerCost:
    leader, moments = statistics.leader[layer.name], statistics.of(layer.name)
    x = tensors[leader].flatten(0, -2).float()
    total = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64)
    gram = _timed(lambda: add_gram_(total, x))[0] if leader == layer.name else 0.0
    prune_layer(layer, moments, replace(job.config, sweeps=1))  # compiles
    seconds, _ = _timed(lambda: prune_layer(layer, moments, job.config))
    return LayerCost(layer.shape, leader, gram, seconds)


def _tuning(job: Job, states: States, statistics: Statistics) -> float:
    """Seconds of a step: what more passes take than fewer."""
    stream, windows = states.stream, states.windows
    targets = [stream.run(0, window, None) for window in windows]
    quick = replace(job.config, sweeps=0)
    layers = {layer.name: prune_layer(layer, statistics.of(layer.name), quick)[0] for layer in job.layers}
    aim = StateAim(lambda window: stream.run(0, windows[window], None, torch.is_grad_enabled()), targets)
    took = []
    with frozen(job.model):
        for name, layer in layers.items():
            job.model.set_submodule(name, layer)
        for matching in (Matching(passes, job.config.rate) for passes in PASSES):
            took.append(_timed(lambda m=matching: match_block_(job.model, layers, aim, m, 0))[0])
    fewer, more = (Matching(passes, job.config.rate).steps(WINDOWS) for passes in PASSES)
    return (took[1] - took[0]) / (more - fewer)


def _small_job(length: int) -> Job:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=HIDDEN // SHRINK,
        intermediate_size=INNER // SHRINK,
        num_hidden_layers=1,
        num_attention_heads=HEADS // SHRINK,
        num_key_value_heads=KEY_HEADS // SHRINK,
        max_position_embeddings=length,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    tokens = torch.randint(256, (WINDOWS, length), generator=torch.Generator().manual_seed(0))
    return make_job(model, tokens, PruneConfig(tail=0))


def _processor() -> str:
    """The name of the processor, where the system tells."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _timed(act: Callable[[], T]) -> tuple[float, T]:
    start = time.process_time()
    found = act()
    return time.process_time() - start, found
