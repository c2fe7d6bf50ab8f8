"""The entry point of the group ``vllm.general_plugins``: vLLM calls it in each of its processes."""

from __future__ import annotations

from llvmlite.binding import ffi
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.platforms import current_platform

from armorfact_hf.vllm.quantization import QUANT_METHOD, ArmorfactQuantization


def register() -> None:
    """Make vLLM know pruned models by the ``quant_method`` in their config.json; may be called many times."""
    register_quantization_config(QUANT_METHOD)(ArmorfactQuantization)
    if current_platform.is_cpu():
        _hide_llvmlite()


def _hide_llvmlite() -> None:
    """Let vLLM walk past llvmlite, which numba brings.

    On a CPU, vLLM's worker asks every object in every loaded module for its ``__dict__``, as a dictionary. llvmlite's
    library makes a function of whatever name it is asked for, of that one too, and the worker ends there.
    """
    functions = getattr(ffi.lib, "_fntab", None)
    if isinstance(functions, dict):
        functions["__dict__"] = {}
