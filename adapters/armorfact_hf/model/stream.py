"""Run one decoder block at a time, through the model's own forward pass.

A model prepares masks, position embeddings and more for its blocks, each family in its own way. To run block i on
hidden states that were stored earlier, the model is called on the tokens, the blocks before i return the stored states
without any work, and the pass ends once block i has run. What the model prepares is thus always its own, no family
needs a special case, and nothing but the hidden states has to be kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from armorfact_hf.model.causal_lm import CausalLM


class _Done(Exception):
    """Ends a forward pass once the module of interest has been reached."""


@dataclass(frozen=True)
class BlockStream:
    """The decoder blocks of a model, to be run one at a time.

    Args:
        model: a causal language model in evaluation mode.
        blocks: its decoder blocks in order.
        extras: for blocks that return a tuple, how many values follow the hidden states; filled by `run` and `noting`.
    """

    model: CausalLM
    blocks: Sequence[nn.Module]
    extras: dict[int, int] = field(default_factory=dict)

    def run(self, index: int, tokens: Tensor, hidden: Tensor | None, gradients: bool = False) -> Tensor:
        """What block ``index`` makes of ``hidden``.

        Args:
            index: from 0; blocks have to be run in order the first time.
            tokens: (1, length) token numbers that ``hidden`` stems from.
            hidden: (1, length, width) what the block before returned; None for the first block.
            gradients: whether those of the block's parameters are going to be asked for.
        """
        block = self.blocks[index]
        forward = block.forward

        def run(*args: Any, **kwargs: Any) -> Tensor:
            return self._noted(index, forward(*args, **kwargs))

        return self._until(block, run, tokens, index, hidden, gradients)

    def head_input(
        self,
        head: nn.Module,
        tokens: Tensor,
        hidden: Tensor | None = None,
        first: int | None = None,
        gradients: bool = False,
    ) -> Tensor:
        """What the head is given when block ``first`` is given ``hidden``; with None, when the model is just run.

        Args:
            first: the first block to be run; None is none of them, so that ``hidden`` is what the last one returned.
            gradients: as for `run`.
        """
        before = 0 if hidden is None else len(self.blocks) if first is None else first
        with self.noting():
            return self._until(head, lambda x: x, tokens, before, hidden, gradients)

    @contextmanager
    def noting(self) -> Iterator[None]:
        """Inside the context, a pass of the model notes in which form each block returns its states, for `logits`."""
        with ExitStack() as stack:
            for index, block in enumerate(self.blocks):
                stack.callback(block.register_forward_hook(self._noting(index)).remove)
            yield

    def logits(self, head: nn.Module, tokens: Tensor, given: Tensor) -> Tensor:
        """The logits, (1, length, vocabulary), for what the head is given, scaled or capped as the model does it.

        Args:
            tokens: (1, length), as many as positions in ``given``; they have no influence.
            given: (1, length, width), a part of what `head_input` returned.
        """
        forward = head.forward
        with ExitStack() as stack:
            for index, block in enumerate(self.blocks):
                stack.enter_context(replaced_forward(block, self._handing_on(index)))
            # With the strides of a tensor of its own: PyTorch multiplies a slice of longer states as a batch, and
            # copies the head's whole weight for it, transposed.
            whole = given[0][None]
            stack.enter_context(replaced_forward(head, lambda _: forward(whole)))
            return self.model(input_ids=tokens.to(self.model.device), use_cache=False).logits

    def _until(
        self,
        module: nn.Module,
        act: Callable[..., Tensor],
        tokens: Tensor,
        before: int,
        hidden: Tensor | None,
        gradients: bool = False,
    ) -> Tensor:
        """Call the model, ``hidden`` in place of its first blocks, up to ``module``; ``act`` of its arguments."""
        reached = []

        def stop(*args: Any, **kwargs: Any) -> None:
            reached.append(act(*args, **kwargs))
            raise _Done

        with ExitStack() as stack:
            for index in range(before):
                stack.enter_context(replaced_forward(self.blocks[index], self._handing_on(index, hidden)))
            stack.enter_context(replaced_forward(module, stop))
            stack.enter_context(torch.set_grad_enabled(gradients))
            try:
                self.model(input_ids=tokens.to(self.model.device), use_cache=False)
            except _Done:
                return reached[0]
        raise RuntimeError(
            f"the forward pass of {type(self.model).__name__} does not call its {type(module).__name__} in the order "
            "of its decoder blocks"
        )

    def _noting(self, index: int) -> Callable[[nn.Module, tuple, Any], None]:
        def hook(_: nn.Module, __: tuple, output: Any) -> None:
            self._noted(index, output)

        return hook

    def _noted(self, index: int, output: Any) -> Tensor:
        """The hidden states in what block ``index`` returned; that it returned more is remembered."""
        if not isinstance(output, tuple | list):
            return output
        self.extras[index] = len(output) - 1
        return output[0]

    def _handing_on(self, index: int, hidden: Tensor | None = None) -> Callable[..., Any]:
        """A forward that returns ``hidden``, or its own argument, in the form in which block ``index`` returns it."""
        extras = self.extras.get(index)

        def hand_on(*args: Any, **kwargs: Any) -> Any:
            states = (args[0] if args else kwargs["hidden_states"]) if hidden is None else hidden
            return states if extras is None else (states, *(None,) * extras)

        return hand_on


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable) -> Iterator[None]:
    """``module`` computes ``forward`` inside the context."""
    kept = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if kept is not None:
            module.forward = kept


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """``model`` is in evaluation mode inside the context."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter that ``model`` has at the start asks for gradients inside the context."""
    asking = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in asking:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in asking:
            parameter.requires_grad_(True)


@contextmanager
def starting_at_embedding(model: CausalLM) -> Iterator[None]:
    """Inside the context, gradients flow back to what the embedding returns, and no parameter asks for any."""
    handle = model.get_input_embeddings().register_forward_hook(lambda _, __, x: x.detach().requires_grad_())
    try:
        with frozen(model):
            yield
    finally:
        handle.remove()
