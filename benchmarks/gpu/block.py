"""One decoder block of Llama-7B's shape with random weights: a step of its tuning, and its pruning from end to end."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

from armorfact import factorize
from armorfact_hf.layers.linear import FactorizedLinear
from armorfact_hf.model.stream import BlockStream, frozen
from armorfact_hf.model.structure import decoder_blocks
from armorfact_hf.pruning.config import PruneConfig
from armorfact_hf.pruning.prune import prune_
from armorfact_hf.pruning.schedule import Matching
from armorfact_hf.pruning.tuning.aims import StateAim
from armorfact_hf.pruning.tuning.matching import match_block_
from benchmarks.gpu.parts import Item
from benchmarks.gpu.report import Values
from benchmarks.gpu.setup import BLOCKS, Setup
from benchmarks.gpu.timer import timer_of

SECOND = (r"re:model\.layers\.1\..*",)  # the first block is tuned four times as long, and the last ones twice
PASSES = (1, 3)


def matching(setup: Setup) -> Iterator[Item]:
    """A step of block matching: one window forward and back, and Muon on all factors of the block."""
    yield {"tokens": setup.length}, partial(_matching, setup)


def pruned(sweeps: int, setup: Setup) -> Iterator[Item]:
    """`prune_` on the second of two blocks with its defaults, but for the number of sweeps."""
    labels = {"sweeps": sweeps, "windows": setup.windows, "tokens": setup.length}
    yield labels, partial(_pruned, setup, sweeps)


def _pruned(setup: Setup, sweeps: int) -> Values:
    model, tokens = _random_model(setup, 2), _random_tokens(setup)
    config = PruneConfig(include=SECOND, sweeps=sweeps, tail=0)
    if setup.device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    seconds = timer_of(setup.device).seconds(lambda: prune_(model, tokens, config))
    values = {"block s": seconds, f"{BLOCKS} blocks min": BLOCKS * seconds / 60}
    return values if setup.device == "cpu" else values | {"peak GB": torch.cuda.max_memory_allocated() / 1e9}


def _matching(setup: Setup) -> Values:
    """What two more passes take, after one that warms up."""
    model, windows = _random_model(setup, 1), _random_tokens(setup).split(1)
    _, blocks = decoder_blocks(model)
    stream = BlockStream(model, blocks)
    targets = [stream.run(0, window, None) for window in windows]
    layers = {name: _in_one_shot(x, setup.wrapper) for name, x in _linear_layers(blocks[0], model)}
    aim = StateAim(lambda window: stream.run(0, windows[window], None, torch.is_grad_enabled()), targets)
    few, many = (Matching(passes, PruneConfig().rate) for passes in PASSES)
    timer = timer_of(setup.device)
    with frozen(model):
        _, short, long = (
            timer.seconds(partial(match_block_, model, layers, aim, tuning, 0)) for tuning in (few, few, many)
        )
    steps = many.steps(len(windows)) - few.steps(len(windows))
    return {"step s": (long - short) / steps, "one pass s": short}


def _random_model(setup: Setup, blocks: int) -> Any:
    config = LlamaConfig(
        hidden_size=setup.hidden,
        intermediate_size=setup.inner,
        num_attention_heads=setup.heads,
        num_hidden_layers=blocks,
        vocab_size=setup.vocabulary,
        max_position_embeddings=setup.length,
    )
    torch.manual_seed(0)
    with torch.device(setup.device):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def _random_tokens(setup: Setup) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(setup.vocabulary, (setup.windows, setup.length), generator=generator).to(setup.device)


def _linear_layers(block: nn.Module, model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """The linear layers of a block, by their names in the model."""
    inside = set(block.modules())
    return ((name, x) for name, x in model.named_modules() if isinstance(x, nn.Linear) and x in inside)


def _in_one_shot(layer: nn.Linear, wrapper: int) -> FactorizedLinear:
    """The layer pruned by magnitude, between wrappers that are identities."""
    found = factorize(layer.weight.detach(), None, block=wrapper, init="magnitude", max_sweeps=0)
    return FactorizedLinear.of(found.core, found.left, found.right)
