"""Where the weights of a model are: in memory, or in its files until their decoder block is at work.

A model on disk is built on the meta device. What lies around its decoder blocks (embeddings, norms, position tables) is
in memory; the tensors of a block, and those of a head of its own, are read from the safetensors files by accelerate's
loader when they are asked for, and given back to the meta device afterwards. On a CPU they are mapped, not copied, as
transformers itself loads them: the same bits at the same addresses within a page.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate.utils import set_module_tensor_to_device
from torch import Tensor, nn

from armorfact_hf.model.causal_lm import CausalLM
from armorfact_hf.model.stream import replaced_forward

Fill = Callable[[Tensor], object]
HEAD = None  # the head's key among the pieces; a decoder block's is its index
Key = int | None
IN_MEMORY = "prune it in memory (--no-stream)"  # the way out of what cannot be streamed


class NotStreamable(ValueError):
    """A model that can only be pruned in memory; the message names what is why, and the way out."""


class Weights(Protocol):
    """Makes the tensors of decoder blocks and of the head available while they are worked with."""

    @property
    def device(self) -> torch.device:
        """Where they are then."""

    def held(self, *keys: Key) -> AbstractContextManager[None]:
        """The tensors of these decoder blocks, or of the head (None), are in memory inside the context.

        At its end each module that was replaced inside of it is back in its place.
        """

    def rehearsing(self) -> AbstractContextManager[None]:
        """Inside the context, the model can be run on tokens to see what it calls; its numbers mean nothing."""


@dataclass(frozen=True, eq=False)
class InMemory:
    """All weights are in memory, and stay there."""

    model: CausalLM

    @property
    def device(self) -> torch.device:
        """That of the model."""
        return self.model.device

    def held(self, *keys: Key) -> AbstractContextManager[None]:
        """Nothing to do: all weights stay in memory."""
        return nullcontext()

    def rehearsing(self) -> AbstractContextManager[None]:
        """The model can be run as it is."""
        return nullcontext()


@dataclass(eq=False)
class Piece:
    """A decoder block, or the head.

    Args:
        modules: those in it that hold tensors themselves, by their names in the model.
        holders: how many contexts hold it now.
    """

    modules: dict[str, nn.Module]
    holders: int = 0

    @property
    def tensors(self) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
        """Name in the model, module, name in the module, tensor."""
        for name, module in self.modules.items():
            for key, tensor in list(module.named_parameters(recurse=False)):
                yield f"{name}.{key}", module, key, tensor

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(tensor.nbytes for _, _, _, tensor in self.tensors)


@dataclass(frozen=True, eq=False)
class OnDisk:
    """A model of which one piece or a few are in memory at a time.

    Args:
        model: its blocks on the meta device.
        blocks: the decoder blocks in order.
        device: where pieces are held.
        files: the safetensors files that it is read from.
        stored: reads a tensor by its name in the model, on the CPU and in the dtype of the model.
        pieces: the decoder blocks by index, and the head under None if it has a weight of its own.
        known: a folder in which digests of the files may be kept.
        reopen: opens the same model anew, in another process say.
        making: bytes that are held beside a tensor, at most, while transformers makes it of stored ones.
    """

    model: CausalLM
    blocks: Sequence[nn.Module]
    device: torch.device
    files: tuple[Path, ...]
    stored: Mapping[str, Tensor]
    pieces: Mapping[Key, Piece]
    known: Path
    reopen: Callable[[], OnDisk]
    making: int = 0

    @contextmanager
    def held(self, *keys: Key) -> Iterator[None]:
        """See `Weights.held`."""
        with ExitStack() as stack:
            for key in keys:
                if key in self.pieces:
                    stack.enter_context(self._filled(self.pieces[key], self.stored.__getitem__))
            yield

    @contextmanager
    def standing_in(self, key: Key, fill: Fill) -> Iterator[None]:
        """Inside the context a piece holds made-up tensors, each given to ``fill`` once; nothing is read."""
        piece = self.pieces[key]
        shapes = {name: tensor for name, _, _, tensor in piece.tensors}

        def made_up(name: str) -> Tensor:
            tensor = torch.zeros(shapes[name].shape, dtype=shapes[name].dtype)
            fill(tensor)
            return tensor

        with self._filled(piece, made_up):
            yield

    @contextmanager
    def rehearsing(self) -> Iterator[None]:
        """The first block of each kind is run, on zeros for weights; others return what that one did."""
        returned: dict[Any, Any] = {}

        def rehearsed(index: int, block: nn.Module) -> Callable[..., Any]:
            kind, forward = _kind(block), block.forward

            def run(*args: Any, **kwargs: Any) -> Any:
                if kind not in returned:
                    with self.standing_in(index, Tensor.zero_):
                        returned[kind] = forward(*args, **kwargs)
                return returned[kind]

            return run

        with ExitStack() as stack:
            if HEAD in self.pieces:
                stack.enter_context(self.standing_in(HEAD, Tensor.zero_))
            for index, block in enumerate(self.blocks):
                stack.enter_context(replaced_forward(block, rehearsed(index, block)))
            yield

    def read(self, name: str) -> Tensor:
        """A tensor of the dense model by its name, on the CPU; one that is in no file, as it is in memory."""
        return self.stored[name] if name in self.stored else self.model.state_dict()[name]

    @contextmanager
    def _filled(self, piece: Piece, read: Callable[[str], Tensor]) -> Iterator[None]:
        piece.holders += 1
        try:
            if piece.holders == 1:
                for name, module, key, _ in piece.tensors:
                    set_module_tensor_to_device(module, key, self.device, value=read(name), clear_cache=False)
            yield
        finally:
            piece.holders -= 1
            if not piece.holders:
                self._emptied(piece)

    def _emptied(self, piece: Piece) -> None:
        for name, module in piece.modules.items():
            if self.model.get_submodule(name) is not module:
                self.model.set_submodule(name, module)
        for _, module, key, _ in piece.tensors:
            set_module_tensor_to_device(module, key, "meta", clear_cache=False)


def _kind(block: nn.Module) -> tuple[Any, ...]:
    """Blocks of one kind call the same layers."""
    return tuple(
        (name, type(module), *(tensor.shape for tensor in module.parameters(recurse=False)))
        for name, module in block.named_modules()
    )
