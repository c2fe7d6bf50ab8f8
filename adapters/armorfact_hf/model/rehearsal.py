"""Run a model once on a few tokens, so that what it cannot do is told before any work."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from armorfact_hf.free_memory import ran_out
from armorfact_hf.model.causal_lm import CausalLM
from armorfact_hf.model.moments import ROUTED, Inputs, recorded_inputs
from armorfact_hf.model.stream import evaluating, frozen
from armorfact_hf.model.structure import Layer

NO_WAY_BACK = "a decoder block passes no gradients on to its layers, so "
CANNOT_BE_TUNED = f"{NO_WAY_BACK}it cannot be tuned: prune with refine=None"
HEAD_CUTS_OFF = (
    "the model's head passes no gradients on to the last decoder blocks, so they cannot be tuned together: prune with "
    "tail=0 (--tail 0), or load the head's weights in float32 or bfloat16"
)
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
    except (TypeError, ValueError, LookupError, AttributeError, RuntimeError) as error:
        if ran_out(error):
            raise
        raise ValueError(
            f"{type(model).__name__} cannot be run on tokens ({type(error).__name__}: {error}): expected a causal "
            "language model whose weights are all on one device and fit each other in dtype"
        ) from error


@torch.enable_grad()
def refuse_without_gradients(
    model: CausalLM,
    blocks: Sequence[nn.Module],
    layers: Sequence[Layer],
    tokens: Tensor,
    refused: str,
    through_head: bool = False,
) -> None:
    """Raise ValueError if gradients do not come as far as they have to.

    Experts are left out, as no module of their own is called; so are blocks that another one stands in for.

    Args:
        refused: what is said if none comes from behind a decoder block to what its layers return.
        through_head: they have to come from the words to what the last decoder block returns, too.
    """
    reached: dict[int, bool] = {}
    words = len(blocks)

    def begin(index: int) -> Callable:
        def leads_back(_: nn.Module, __: Any, output: Any) -> Any:
            reached[index] = False
            first, *others = output if isinstance(output, tuple | list) else (output,)
            cut = first.detach().requires_grad_().clone()  # what follows may go on in place
            return (cut, *others) if isinstance(output, tuple | list) else cut

        return leads_back

    def end(index: int) -> Callable:
        def look(_: nn.Module, __: Any, output: Any) -> None:
            if index in reached:
                reached[index] = (output[0] if isinstance(output, tuple | list) else output).requires_grad

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
        if through_head:
            stack.callback(blocks[-1].register_forward_hook(begin(words)).remove)
            stack.callback(model.get_output_embeddings().register_forward_hook(end(words)).remove)
        _run(model, tokens[:1, :TOKENS])
    if not reached.pop(words, True):
        raise ValueError(HEAD_CUTS_OFF)
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
