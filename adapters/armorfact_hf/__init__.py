"""Everything of armorfact that knows Hugging Face: models, calibration, checkpoints, evaluation.

    from armorfact_hf import PruneConfig, evaluate_perplexity, load_pruned, prune_

Importing it lets transformers' own `from_pretrained` load pruned models. What is imported from here is loaded from its
own module on first use, so that a command that needs no model stays fast.
"""

from importlib import import_module
from typing import Any

from armorfact_hf.registration import register

register()

_HOMES = {
    "Calibration": "workflow",
    "DifferentRun": "journal",
    "Evaluation": "assess",
    "Execution": "execution.choice",
    "FactorizedLinear": "linear",
    "NonFiniteActivations": "statistics",
    "NotPruned": "format",
    "Perplexity": "perplexity",
    "Plan": "plan",
    "PruneConfig": "config",
    "PruneReport": "prune",
    "Step": "block_by_block",
    "bench_folder": "bench",
    "compare": "assess",
    "end_to_end": "throughput",
    "evaluate_folder": "assess",
    "evaluate_perplexity": "perplexity",
    "evaluate_tasks": "tasks",
    "export_dense": "look",
    "inspect_folder": "look",
    "load_model": "sources",
    "load_pruned": "checkpoint",
    "make_plan": "plan",
    "prune_": "prune",
    "prune_to_folder": "workflow",
    "save_pruned": "checkpoint",
    "time_layers": "bench",
    "to_dense_": "checkpoint",
    "tokenize": "demo_text",
    "verify_folder": "verify",
    "windows": "demo_text",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
