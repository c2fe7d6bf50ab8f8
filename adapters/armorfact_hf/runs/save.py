"""A model pruned in memory, written as a folder that explains itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from armorfact_hf.checkpoint import folder as checkpoint
from armorfact_hf.model.causal_lm import CausalLM
from armorfact_hf.report.card import write_card


def save_pruned(model: CausalLM, folder: Path | str, tokenizer: Any = None) -> None:
    """Write a pruned model, and its tokenizer if given, with transformers' own `save_pretrained`, and a model card.

    A README.md that somebody else wrote into the folder is left alone.

    Raises:
        NotPruned: the model has no pruned layers.
    """
    checkpoint.save_pruned(model, folder, tokenizer)
    write_card(Path(folder))
