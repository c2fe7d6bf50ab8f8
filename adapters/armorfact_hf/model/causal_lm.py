"""The type of what is pruned, for type checkers."""

from __future__ import annotations

from typing import Any, TypeAlias

# A causal language model of transformers. Any, since `torch.nn.Module` says of whatever it holds, a config or a dtype,
# that it is a Tensor or a Module.
CausalLM: TypeAlias = Any
