"""Text that a model writes itself, to calibrate it on: a sample of what it was trained on, where that is not at hand.

Documents are drawn word by word from the model's own probabilities, as they are, from nothing but the token that
begins one (Williams, Chrysostomou and Aletras 2025, "Self-calibration for language model quantization and pruning").
They are nonsense as often as not, and in every language and kind of text that the model knows: that is the use of them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from armorfact_hf.data.load_model import Loaded
from armorfact_hf.data.wheels import cache_folder
from armorfact_hf.files import remember
from armorfact_hf.layers.stack import PRUNED
from armorfact_hf.model.causal_lm import CausalLM, cache_name
from armorfact_hf.model.on_disk import OnDisk
from armorfact_hf.observer import Log
from armorfact_hf.pruning.fingerprint import config_fingerprint

SELF = "self"  # the name of such a text among those to calibrate on
LONGEST = 512  # tokens that are written in one go; documents that end before are followed by others
ROWS = 64  # that are written at a time, at most
SPARE = 1.2  # times as many tokens as are asked for: documents are put into words, and these into tokens again
VERSION = 1  # of how a text is drawn


def own_text(loaded: Loaded, tokens: int, log: Log) -> str:
    """A text of so many tokens or more that a dense model wrote, kept in the cache for the next time.

    Raises:
        ValueError: the model is pruned, or not in memory.
    """
    check_writer(loaded)
    key = [VERSION, loaded.fingerprint, config_fingerprint(loaded.model), tokens]
    path = cache_folder() / "written" / f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]}.txt"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    log(f"{loaded.name} writes {tokens:,} tokens of text to be calibrated on; this takes some minutes.")
    text = write_text(loaded.model, loaded.tokenizer, tokens)
    remember(path, text)
    return text


def check_writer(loaded: Loaded) -> None:
    """Raise ValueError if a model cannot write its own text."""
    if isinstance(loaded.weights, OnDisk):
        raise ValueError(
            f"{loaded.name} is read from disk one decoder block at a time, which is too slow to write text: let "
            "`armorfact write` do it on a machine that holds the model, and give its file"
        )
    if any(isinstance(module, PRUNED) for module in loaded.model.modules()):
        raise ValueError(
            f"{loaded.name} is pruned: let `armorfact write` write the dense model's text, and give that file"
        )


def write_text(
    model: CausalLM,
    tokenizer: Any,
    tokens: int,
    seed: int = 0,
    progress: Callable[[int, int], object] | None = None,
) -> str:
    """Documents that a model writes, one after another with an empty line between.

    Args:
        model: a dense causal language model in evaluation mode, on any device.
        tokenizer: the model's own.
        tokens: how many at least, as the tokenizer counts them. seed: of the words that are drawn.
        progress: called with the steps done and those there will be, before each.

    Raises:
        ValueError: the model has no token that begins a document, or writes empty ones.
    """
    documents: list[str] = []
    rows = min(-(-int(SPARE * tokens) // LONGEST), ROWS)
    generator = torch.Generator(model.device).manual_seed(seed)
    while _count("\n\n".join(documents), tokenizer) < tokens:
        found = _drawn(model, _marks(model, tokenizer), rows, generator, progress)
        written = [text for x in found if (text := tokenizer.decode(x, skip_special_tokens=True).strip())]
        if not written:
            raise ValueError("the model ends every document before a word: calibrate it on a text that you give")
        documents += written
    return "\n\n".join(documents)


def _count(text: str, tokenizer: Any) -> int:
    return len(tokenizer(text, add_special_tokens=False)["input_ids"]) if text else 0


def _marks(model: CausalLM, tokenizer: Any) -> list[int]:
    """The token that begins a document, and those that end one."""
    ends = model.generation_config.eos_token_id if model.generation_config is not None else None
    ends = ends if isinstance(ends, list) else [ends]
    known = [tokenizer.bos_token_id, model.config.bos_token_id, tokenizer.eos_token_id, *ends]
    if not (found := [token for token in known if token is not None]):
        raise ValueError("the model has no token that begins or ends a text: calibrate it on a text that you give")
    return found


@torch.inference_mode()
def _drawn(
    model: CausalLM,
    marks: list[int],
    rows: int,
    generator: torch.Generator,
    progress: Callable[[int, int], object] | None,
) -> Iterator[list[int]]:
    """The tokens of every document, without marks."""
    cache, past = cache_name(model), dict[str, Any]()
    last, columns = torch.full((rows, 1), marks[0], device=model.device), []
    longest = min(LONGEST, (getattr(model.config, "max_position_embeddings", None) or LONGEST + 1) - 1)
    for step in range(longest):
        if progress is not None:
            progress(step, longest)
        output = model(input_ids=last, use_cache=True, **past)
        past = {cache: output[cache]}
        last = _draw(output.logits[:, -1], generator)
        columns.append(last)
    for row in torch.cat(columns, 1).tolist():
        ends = [-1, *(place for place, token in enumerate(row) if token in marks), len(row)]
        yield from (row[first + 1 : end] for first, end in pairwise(ends))


def _draw(logits: Tensor, generator: torch.Generator) -> Tensor:
    """A token of each row by its probability, (rows, 1): the first to come of exponential waiting times."""
    waiting = torch.empty_like(logits, dtype=torch.float32).exponential_(generator=generator)
    return (logits.float().softmax(-1) / waiting).argmax(-1, keepdim=True)
