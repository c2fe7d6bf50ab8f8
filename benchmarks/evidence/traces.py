"""What calibration windows show of a few layers: their inputs, and how much the model cares for each output.

For every layer and token t, x_t is the input and g_t the gradient of the log-likelihood at the layer's output, the
label of each position drawn from the model's own softmax. E[g g'] is then the Fisher information at that output, and an
error e_t there costs about e_t' g_t g_t' e_t / 2 in KL divergence. One forward and backward pass a window.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from armorfact_hf.files import written_beside
from armorfact_hf.model.moments import Inputs, recorded_gradients, recorded_inputs
from armorfact_hf.model.stream import BlockStream, replaced_forward, starting_at_embedding
from armorfact_hf.model.structure import Layer, decoder_blocks
from armorfact_hf.model.token_divergence import drawn_gradient


@dataclass(frozen=True)
class Trace:
    """What all windows show of one layer.

    Args:
        inputs: x, one (tokens, d_in) tensor a window.
        importance: s_t = mean_j g_tj^2, one (tokens,) float32 tensor a window.
        output_gram: mean over all tokens of g g' on the rows of each block, (blocks, size, size) float64.
    """

    inputs: list[Tensor]
    importance: list[Tensor]
    output_gram: Tensor


def trace_window(
    model: nn.Module, layers: Sequence[Layer], tokens: Tensor, blocks: dict[str, int], seed: int, every: int = 1
) -> dict[str, Tensor]:
    """The tensors that one window adds, by name.

    Args:
        tokens: (1, length).
        blocks: for each layer, the size of the blocks of rows on which g g' is summed.
        seed: of the labels.
        every: draw a label at each so-manieth position only, and scale; the head is dear where the vocabulary is large.

    Returns:
        "inputs/<leader>" in the model's dtype, "importance/<layer>" (length,) and "gram/<layer>" (blocks, size, size),
        a sum over the tokens, both float32; "leader/<layer>" holds the number of the layer whose input it shares.
    """
    modules = {layer.name: layer.module for layer in layers}
    stream = BlockStream(model, decoder_blocks(model)[1])
    with recorded_inputs(modules) as inputs, recorded_gradients(modules) as gradients, starting_at_embedding(model):
        given = _head_input(model, tokens)
        given.backward(drawn_gradient(stream, tokens, given.detach(), seed, every))
    found = {name: gradient.flatten(0, -2).float() for name, gradient in gradients.items()}
    return _tensors(layers, inputs, found, blocks)


@torch.enable_grad()
def _head_input(model: nn.Module, tokens: Tensor) -> Tensor:
    """What the head is given, with its graph."""
    head, seen = model.get_output_embeddings(), []

    def forward(given: Tensor) -> Tensor:
        seen.append(given)
        return given

    with replaced_forward(head, forward):
        model(input_ids=tokens, use_cache=False)
    return seen[0]


def _tensors(
    layers: Sequence[Layer], inputs: Inputs, gradients: dict[str, Tensor], blocks: dict[str, int]
) -> dict[str, Tensor]:
    names = [layer.name for layer in layers]
    found = {f"inputs/{leader}": x.detach().flatten(0, -2).contiguous() for leader, x in inputs.tensors.items()}
    for name in names:
        gradient = gradients[name]
        found[f"leader/{name}"] = torch.tensor(names.index(inputs.leader[name]))
        found[f"importance/{name}"] = gradient.square().mean(1)
        found[f"gram/{name}"] = block_gram(gradient, blocks[name])
    return found


def block_gram(gradients: Tensor, size: int) -> Tensor:
    """The sum over tokens of g g' on the rows of each block, (blocks, size, size).

    Args:
        gradients: g, (tokens, d_out). size: of the blocks.
    """
    rows = gradients.reshape(len(gradients), -1, size)
    return torch.einsum("tbi,tbj->bij", rows, rows)


def write_traces(
    folder: Path,
    model: nn.Module,
    layers: Sequence[Layer],
    windows: Tensor,
    blocks: dict[str, int],
    check: Callable,
    every: int = 1,
) -> None:
    """A file for each window that has none yet; ``check`` is called before each and may raise."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, tokens in enumerate(windows.split(1)):
        path = folder / f"window-{index:03}.safetensors"
        if not path.exists():
            check()
            with written_beside(path) as draft:
                save_file(trace_window(model, layers, tokens, blocks, index, every), draft)


def read_trace(folder: Path, layers: Sequence[Layer], layer: Layer) -> Trace:
    """What the files of a folder show of one layer."""
    inputs, importance, gram, tokens = [], [], None, 0
    for path in sorted(folder.glob("window-*.safetensors")):
        with safe_open(path, "pt") as window:
            leader = layers[int(window.get_tensor(f"leader/{layer.name}"))].name
            inputs.append(window.get_tensor(f"inputs/{leader}"))
            importance.append(window.get_tensor(f"importance/{layer.name}"))
            part = window.get_tensor(f"gram/{layer.name}").double()
        gram = part if gram is None else gram + part
        tokens += len(inputs[-1])
    if gram is None:
        raise ValueError(f"{folder} holds no traces: write_traces makes them")
    return Trace(inputs, importance, gram / tokens)
