"""Run a model once on a few tokens, so that what it cannot do is told before any work."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from armorfact_hf.model.causal_lm import CausalLM
from armorfact_hf.model.moments import ROUTED, Inputs, recorded_inputs
from armorfact_hf.model.stream import evaluating, frozen
from armorfact_hf.model.structure import Layer

NO_WAY_BACK = "a decoder block passes no gradients on to its layers, so "
CANNOT_BE_TUNED = f"{NO_WAY_BACK}it cannot be tuned: prune with refine=None"
HAVE_NO_PRICES = f"{NO_WAY_BACK}they have no prices: prune with block='auto'"
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


@torch.enable_grad()
def refuse_without_gradients(
    model: nn.Module, blocks: Sequence[nn.Module], layers: Sequence[Layer], tokens: Tensor, refused: str
) -> None:
    """Raise ValueError, ``refused``, if no gradient comes from behind a decoder block to what its layers return.

    Experts are left out, as no module of their own is called; so are blocks that another one stands in for.
    """
    reached: dict[int, bool] = {}

    def begin(index: int) -> Callable:
        def leads_back(_: nn.Module, __: Any, output: Tensor) -> Tensor:
            reached[index] = False
            return output.detach().requires_grad_().clone()  # a block may go on in place

        return leads_back

    def end(index: int) -> Callable:
        def look(_: nn.Module, __: Any, output: Any) -> None:
            if index in reached:
                reached[index] = (output[0] if isinstance(output, tuple) else output).requires_grad

        return look

    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        stack.enter_context(frozen(model))
        for layer in layers:
            if layer.decoder_block is not None and not layer.stack:
                stack.callback(layer.module.register_forward_hook(begin(layer.decoder_block)).remove)
        for index, block in enumerate(blocks):
            stack.callback(block.register_forward_pre_hook(_cut_off, with_kwargs=True).remove)
            stack.callback(block.register_forward_hook(end(index)).remove)
        _run(model, tokens[:1, :TOKENS])
    if not all(reached.values()):
        raise ValueError(refused)


def _cut_off(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """What a block is given, without the way back to the blocks before."""

    def cut(x: Any) -> Any:
        return x.detach() if isinstance(x, Tensor) else x

    return tuple(map(cut, args)), {name: cut(x) for name, x in kwargs.items()}


def refuse_routed(inputs: Inputs, tokens: Tensor, layers: Sequence[Layer]) -> None:
    """Raise ValueError if a layer is one of an expert, or is given only some of the tokens of a rehearsal."""
    for layer in layers:
        if layer.stack:
            raise ValueError(f"{layer.name} is given the tokens that are routed to it: {ROUTED}")
    whole = tokens[:1, :TOKENS].numel()
    for name, tensor in inputs.tensors.items():
        if (rows := tensor.flatten(0, -2).shape[0]) % whole:
            raise ValueError(f"{name} is given {rows} of {whole} tokens: {ROUTED}")
