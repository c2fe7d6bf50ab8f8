"""Run a model once on a few tokens, so that what it cannot do is told before any work."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from armorfact_hf.model.causal_lm import CausalLM
from armorfact_hf.model.moments import ROUTED, Inputs, recorded_inputs
from armorfact_hf.model.stream import evaluating
from armorfact_hf.model.structure import Layer

TOKENS = 32  # enough that experts, if there are any, see different ones


def rehearse(model: nn.Module, blocks: Sequence[nn.Module], layers: Sequence[Layer], tokens: Tensor) -> Inputs:
    """What the layers are given when the model runs on the first few of a window's tokens.

    Args:
        blocks: the decoder blocks. tokens: (windows, length).

    Raises:
        ValueError: the model cannot be run on tokens alone, or does not call every block once and in order.
    """
    called: list[int] = []

    def note(index: int) -> Callable:
        return lambda *_: called.append(index)

    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        stack.enter_context(torch.no_grad())
        for index, block in enumerate(blocks):
            stack.callback(block.register_forward_pre_hook(note(index)).remove)
        inputs = stack.enter_context(recorded_inputs({layer.name: layer.module for layer in layers}))
        _run(model, tokens[:1, :TOKENS])
    if called != list(range(len(blocks))):
        order = ", ".join(str(index + 1) for index in called)
        raise ValueError(
            f"{type(model).__name__} has {len(blocks)} decoder blocks and calls them in the order {order}: expected "
            "each once, one after the other"
        )
    return inputs


def _run(model: CausalLM, tokens: Tensor) -> None:
    try:
        model(input_ids=tokens.to(model.device), use_cache=False)
    except torch.OutOfMemoryError:
        raise
    except (TypeError, ValueError, LookupError, AttributeError, RuntimeError) as error:
        raise ValueError(
            f"{type(model).__name__} cannot be run on tokens ({type(error).__name__}: {error}): expected a causal "
            "language model whose weights are all on one device and fit each other in dtype"
        ) from error


def refuse_routed(inputs: Inputs, tokens: Tensor, layers: Sequence[Layer]) -> None:
    """Raise ValueError if a layer is one of an expert, or is given only some of the tokens of a rehearsal."""
    for layer in layers:
        if layer.stack:
            raise ValueError(f"{layer.name} is given the tokens that are routed to it: {ROUTED}")
    whole = tokens[:1, :TOKENS].numel()
    for name, tensor in inputs.tensors.items():
        if (rows := tensor.flatten(0, -2).shape[0]) % whole:
            raise ValueError(f"{name} is given {rows} of {whole} tokens: {ROUTED}")
