"""What calibration windows show of a few layers: their inputs, and how much the model cares for each output.

For every layer and token t, x_t is the input and g_t the gradient of the log-likelihood at the layer's output, the
label of each position drawn from the model's own softmax. E[g g'] is then the Fisher information at that output, and an
error e_t there costs about e_t' g_t g_t' e_t / 2 in KL divergence. One forward and backward pass a window.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from armorfact_hf.files import written_beside
from armorfact_hf.model.moments import Inputs, recorded_inputs
from armorfact_hf.model.stream import BlockStream, replaced_forward
from armorfact_hf.model.structure import Layer, decoder_blocks

POSITIONS_AT_ONCE = 256


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
    gradients: dict[str, Tensor] = {}
    with recorded_inputs({layer.name: layer.module for layer in layers}) as inputs, ExitStack() as stack:
        for layer in layers:
            handle = layer.module.register_forward_hook(_keeping_gradient(gradients, layer.name))
            stack.callback(handle.remove)
        _backward(model, tokens, torch.Generator().manual_seed(seed), slice(seed % every, None, every))
    return _tensors(layers, inputs, gradients, blocks)


def _keeping_gradient(gradients: dict[str, Tensor], name: str) -> Callable:
    def hook(_: nn.Module, __: Any, output: Tensor) -> None:
        output.register_hook(lambda gradient: gradients.__setitem__(name, gradient.flatten(0, -2).float()))

    return hook


def _backward(model: nn.Module, tokens: Tensor, generator: torch.Generator, scored: slice) -> None:
    """One forward and backward pass; no parameter gets a gradient, only the states after the embedding."""
    frozen = [parameter for parameter in model.parameters() if parameter.requires_grad]
    embedding = model.get_input_embeddings()
    handle = embedding.register_forward_hook(lambda _, __, output: output.detach().requires_grad_())
    try:
        for parameter in frozen:
            parameter.requires_grad_(False)
        with torch.enable_grad():
            given = _head_input(model, tokens)
            gradient = torch.zeros_like(given)
            part = _head_gradient(model, tokens, given[:, scored].detach(), generator)
            # Labels are independent, so second moments add up over positions: a part of them stands for all.
            gradient[:, scored] = scored.step**0.5 * part
            given.backward(gradient)
    finally:
        handle.remove()
        for parameter in frozen:
            parameter.requires_grad_(True)


def _head_input(model: nn.Module, tokens: Tensor) -> Tensor:
    """What the head is given, with its graph."""
    head, seen = model.get_output_embeddings(), []

    def forward(given: Tensor) -> Tensor:
        seen.append(given)
        return given

    with replaced_forward(head, forward):
        model(input_ids=tokens, use_cache=False)
    return seen[0]


def _head_gradient(model: nn.Module, tokens: Tensor, given: Tensor, generator: torch.Generator) -> Tensor:
    """The gradient of the log-likelihood of drawn labels at the head's input, a few positions at a time."""
    stream, head = BlockStream(model, decoder_blocks(model)[1]), model.get_output_embeddings()
    parts = []
    for lo in range(0, given.shape[1], POSITIONS_AT_ONCE):
        part = given[:, lo : lo + POSITIONS_AT_ONCE].clone().requires_grad_()
        logits = stream.logits(head, tokens[:, lo : lo + part.shape[1]], part)[0].float()
        labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
        loss = -functional.cross_entropy(logits, labels, reduction="sum")
        parts.append(torch.autograd.grad(loss, part)[0])
    return torch.cat(parts, dim=1)


def _tensors(
    layers: Sequence[Layer], inputs: Inputs, gradients: dict[str, Tensor], blocks: dict[str, int]
) -> dict[str, Tensor]:
    names = [layer.name for layer in layers]
    found = {f"inputs/{leader}": x.detach().flatten(0, -2).contiguous() for leader, x in inputs.tensors.items()}
    for name in names:
        gradient = gradients[name]
        rows = gradient.reshape(len(gradient), -1, blocks[name])
        found[f"leader/{name}"] = torch.tensor(names.index(inputs.leader[name]))
        found[f"importance/{name}"] = gradient.square().mean(1)
        found[f"gram/{name}"] = torch.einsum("tbi,tbj->bij", rows, rows)
    return found


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
