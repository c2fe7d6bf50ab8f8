"""What every causal language model of transformers has in common."""

from __future__ import annotations

import inspect
from typing import Any, TypeAlias

# A causal language model of transformers. Any, since `torch.nn.Module` says of whatever it holds, a config or a dtype,
# that it is a Tensor or a Module.
CausalLM: TypeAlias = Any


def takes(model: CausalLM, argument: str) -> bool:
    """Whether the model's forward has an argument of that name."""
    return argument in inspect.signature(model.forward).parameters


def cache_name(model: CausalLM) -> str:
    """What the model calls the keys and values of the tokens it has read, as an argument and in its output.

    transformers renamed ``past_key_values`` to ``cache``, and a model that came with its own code may still not.
    """
    return "cache" if takes(model, "cache") else "past_key_values"
