"""How many tokens a rare expert should borrow: a small mixture is trained, and its experts pruned from few tokens.

    python -m benchmarks.experts
    python -m benchmarks.experts --steps 1200 --tokens 1024

Bytes of Wikipedia articles; 2 blocks of 8 experts, 2 for each token. The loss is that of each expert's gate and down
projections on the tokens that are routed to it in other articles, relative to the layer's output there, for n0 borrowed
tokens for each input (`armorfact_hf.pruning.experts`). The last column is of the experts with the fewest tokens.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM

from armorfact import factorize
from armorfact_hf.data.texts import calibration_source, evaluation_source
from armorfact_hf.model.experts import run_by_expert
from armorfact_hf.model.moments import Statistics, recorded_inputs
from armorfact_hf.model.structure import Layer, chosen_layers
from armorfact_hf.pruning.experts import pool_
from armorfact_hf.pruning.layer import shrunk
from armorfact_hf.pruning.losses import energy

TEXT = "demo:gensim-enwiki"
WINDOW, BATCH, RARE = 128, 16, 4
BORROWED = (0.0, 1 / 16, 1 / 4, 1.0, 4.0, 16.0)


def trained(tokens: Tensor, steps: int) -> nn.Module:
    """A mixture that has read some of the bytes."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = MixtralForCausalLM(
        MixtralConfig(vocab_size=256, **sizes, num_key_value_heads=4, num_local_experts=8, num_experts_per_tok=2)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(steps):
        batch = tokens[torch.randint(len(tokens), (BATCH,))]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 99:
            print(f"step {step + 1}: {float(loss.detach()):.3f} nats a byte")
    return model.eval().requires_grad_(False)


def windows_of(text: str) -> Tensor:
    """(windows, `WINDOW`) bytes."""
    found = torch.tensor(list(text.encode()))
    return found[: len(found) // WINDOW * WINDOW].view(-1, WINDOW)


@torch.no_grad()
def gathered(model: nn.Module, layers: list[Layer], tokens: Tensor) -> Statistics:
    """Second moments of what the layers are given."""
    modules, found = {layer.name: layer.module for layer in layers}, Statistics()
    for window in tokens.split(BATCH):
        with run_by_expert(modules), recorded_inputs(modules) as inputs:
            model(input_ids=window)
        found.add(inputs)
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400, help="of training")
    parser.add_argument("--tokens", type=int, default=512, help="that experts are pruned from")
    parser.add_argument("--sweeps", type=int, default=8)
    args = parser.parse_args()
    reading = windows_of(calibration_source(TEXT).content[: 1 << 21])
    model = trained(reading, args.steps)
    layers = [x for x in chosen_layers(model)[0] if x.stack and x.decoder_block == 1 and not x.name.endswith(".up")]
    elsewhere = gathered(model, layers, windows_of(evaluation_source(TEXT).content[: 1 << 17]))
    few = reading[: args.tokens // WINDOW]
    print(f"tokens by expert: {sorted(gathered(model, layers, few).tokens.values())[::2]}")
    print("| n0 / d | gate | down | the rarest |\n|---|---|---|---|")
    for borrowed in BORROWED:
        found = losses(layers, gathered(model, layers, few), elsewhere, borrowed, args.sweeps)
        print(f"| {borrowed:g} | " + " | ".join(f"{loss:.4f}" for loss in found))


def losses(
    layers: list[Layer], statistics: Statistics, elsewhere: Statistics, borrowed: float, sweeps: int
) -> list[float]:
    """The mean losses elsewhere of gate and down projections, and of all those of the rarest experts."""
    counts = dict(statistics.tokens)
    pool_(statistics, layers, borrowed)
    found: dict[str, float] = {}
    for layer in layers:
        if layer.name in counts and layer.name in elsewhere.leader:
            gram, there = shrunk(statistics.of(layer.name).gram, 1.0), elsewhere.of(layer.name).gram
            pruned = factorize(layer.weight, gram.float(), block=8, max_sweeps=sweeps)
            found[layer.name] = energy(layer.weight - pruned.dense(), there) / energy(layer.weight, there)
    rare = sorted(found, key=counts.__getitem__)[: 2 * RARE]
    groups = [name for name in found if name.endswith("gate")], [name for name in found if name.endswith("down")], rare
    return [sum(found[name] for name in group) / len(group) for group in groups]


if __name__ == "__main__":
    main()
