"""Find the module of a model that is first to compute NaN or infinite values."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

import torch
from torch import Tensor, nn


class NonFiniteActivations(RuntimeError):
    """A module of the model computes NaN or infinite values; the message names the first that does."""


def first_nonfinite(block: nn.Module, name: str, run: Callable[[], object]) -> str | None:
    """The module that is first to return NaN or infinite values while ``run()`` calls ``block``, or None.

    Innermost modules return first, so the name is as exact as the module tree allows.

    Args:
        block: a decoder block; name: its name in the model.
        run: calls the block.
    """
    found: list[str] = []

    def before(_: nn.Module, args: tuple, kwargs: dict) -> None:
        if not _finite(args or kwargs.get("hidden_states")):
            found.append(f"the embedding, before {name},")

    def after(inner: str) -> Callable:
        def check(_: nn.Module, __: tuple, output: object) -> None:
            if not _finite(output):
                found.append(inner)

        return check

    with ExitStack() as stack:
        stack.callback(block.register_forward_pre_hook(before, with_kwargs=True).remove)
        for inner, module in block.named_modules():
            stack.callback(module.register_forward_hook(after(f"{name}.{inner}".rstrip("."))).remove)
        run()
    return found[0] if found else None


def _finite(values: object) -> bool:
    tensors = values if isinstance(values, tuple | list) else (values,)
    return all(bool(torch.isfinite(x).all()) for x in tensors if isinstance(x, Tensor) and x.is_floating_point())
