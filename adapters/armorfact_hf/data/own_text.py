"""Text that a model writes itself, to calibrate it on: a sample of what it was trained on, where that is not at hand.

Documents are drawn word by word from the model's own probabilities, as they are, from nothing but the token that
begins one (Williams, Chrysostomou and Aletras 2025, "Self-calibration for language model quantization and pruning").
They are nonsense as often as not, and in every language and kind of text that the model knows: that is the use of them.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from armorfact_hf.checkpoint.fingerprint import config_fingerprint
from armorfact_hf.data.load_model import Loaded
from armorfact_hf.data.wheels import cache_folder
from armorfact_hf.files import check_room, written_beside
from armorfact_hf.layers.stack import pruned_modules
from armorfact_hf.model.causal_lm import CausalLM, cache_name
from armorfact_hf.model.on_disk import OnDisk
from armorfact_hf.observer import Count, Log

SELF = "self"  # the name of such a text among those to calibrate on
LONGEST = 512  # tokens that are written in one go; documents that end before are followed by others
ROWS = 64  # that are written at a time, at most
CACHE_BYTES = 2**31  # of keys and values that all rows may take, at most, as far as a config tells
BYTES_A_TOKEN = 16  # of text, far more than there are
SPARE = 1.2  # times as many tokens as are asked for: documents are put into words, and these into tokens again
VERSION = 1  # of how a text is drawn
WRITING = "writing text"  # what is being done, for whoever watches


def own_text(loaded: Loaded, tokens: int, log: Log, progress: Count | None = None) -> str:
    """A text of so many tokens or more that a dense model wrote, kept in the cache for the next time.

    Raises:
        ValueError: the model cannot write (`check_writer`). OSError: the cache has no room for it.
    """
    key = [VERSION, loaded.fingerprint, config_fingerprint(loaded.model), tokens]
    key += [_marks(loaded.model, loaded.tokenizer), loaded.tokenizer.get_vocab()]
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    path = cache_folder() / "written" / f"{digest[:32]}.txt"
    if not path.is_file():
        check_writer(loaded)
        check_room(path.parent, BYTES_A_TOKEN * tokens)
        log(f"{loaded.name} writes {tokens:,} tokens of text to be calibrated on; this takes some minutes.")
        text = write_text(loaded.model, loaded.tokenizer, tokens, progress=progress)
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_beside(path) as draft:
            draft.write_text(text, encoding="utf-8")
    return path.read_text(encoding="utf-8")


def check_writer(loaded: Loaded) -> None:
    """Raise ValueError if a model cannot write its own text."""
    if isinstance(loaded.weights, OnDisk):
        raise ValueError(
            f"{loaded.name} is read from disk one decoder block at a time, which is too slow to write text: leave out "
            "--stream, or let `armorfact write` do it on a machine that holds the model, and give its file"
        )
    if pruned_modules(loaded.model):
        raise ValueError(
            f"{loaded.name} is pruned: let `armorfact write` write the dense model's text, and give that file"
        )


def write_text(model: CausalLM, tokenizer: Any, tokens: int, seed: int = 0, progress: Count | None = None) -> str:
    """Documents that a model writes, one after another with an empty line between.

    Args:
        model: a dense causal language model in evaluation mode, on any device.
        tokenizer: the model's own.
        tokens: how many at least, as the tokenizer counts them. seed: of the words that are drawn.
        progress: called with the steps done and those there will be, before each.

    Raises:
        ValueError: the model has no token that begins a document, keeps no cache, or writes empty documents.
    """
    marks, documents, done = _marks(model, tokenizer), list[str](), 0
    longest = min(
        LONGEST, (getattr(model.config.get_text_config(), "max_position_embeddings", None) or LONGEST + 1) - 1
    )
    wanted = -(-int(SPARE * tokens) // longest)
    rounds = -(-wanted // _rows(model))
    generator = torch.Generator(model.device).manual_seed(seed)

    def tell(step: int) -> None:
        if progress is not None:
            progress(done * longest + step, max(rounds, done + 1) * longest)

    while _count("\n\n".join(documents), tokenizer) < tokens:
        drawn = _drawn(model, marks, -(-wanted // rounds), longest, generator, tell)
        texts = (tokenizer.decode(document, skip_special_tokens=True) for document in drawn)
        # As a file gives it back: with one kind of line end.
        written = [text for x in texts if (text := x.replace("\r\n", "\n").replace("\r", "\n").strip())]
        if not written:
            raise ValueError("the model ends every document before a word: calibrate it on a text that you give")
        documents, done = documents + written, done + 1
    return "\n\n".join(documents)


def _rows(model: CausalLM) -> int:
    """How many are written at a time: as many on every machine, as all later words depend on it."""
    config = model.config.get_text_config()
    sizes = [getattr(config, name, None) or 1 for name in ("num_hidden_layers", "hidden_size")]
    row = 2 * LONGEST * math.prod(sizes) * model.dtype.itemsize  # keys and values, of every head at most
    return min(ROWS, max(CACHE_BYTES // row, 1))


def _count(text: str, tokenizer: Any) -> int:
    return len(tokenizer(text, add_special_tokens=False)["input_ids"]) if text else 0


def _marks(model: CausalLM, tokenizer: Any) -> list[int]:
    """The token that begins a document, and those that end one."""
    ends = model.generation_config.eos_token_id if model.generation_config is not None else None
    ends = ends if isinstance(ends, list) else [ends]
    begins = getattr(model.config.get_text_config(), "bos_token_id", None)
    known = [tokenizer.bos_token_id, begins, tokenizer.eos_token_id, *ends]
    if not (found := [token for token in known if token is not None]):
        raise ValueError("the model has no token that begins or ends a text: calibrate it on a text that you give")
    return found


@torch.inference_mode()
def _drawn(
    model: CausalLM,
    marks: list[int],
    rows: int,
    longest: int,
    generator: torch.Generator,
    tell: Callable[[int], None],
) -> list[list[int]]:
    """The tokens of every document, without marks."""
    cache, past = cache_name(model), dict[str, Any]()
    last, columns = torch.full((rows, 1), marks[0], device=model.device), []
    for step in range(longest):
        tell(step)
        output = model(input_ids=last, use_cache=True, **past)
        if output.get(cache) is None:
            raise ValueError(f"{type(model).__name__} keeps no cache to write by: calibrate it on a text that you give")
        past = {cache: output[cache]}
        last = _draw(output.logits[:, -1], generator)
        columns.append(last)
    found = []
    for row in torch.cat(columns, 1).tolist():
        ends = [-1, *(place for place, token in enumerate(row) if token in marks), len(row)]
        found += [row[first + 1 : end] for first, end in pairwise(ends)]
    return found


def _draw(logits: Tensor, generator: torch.Generator) -> Tensor:
    """A token of each row by its probability, (rows, 1): the first to come of exponential waiting times."""
    waiting = torch.empty_like(logits, dtype=torch.float32).exponential_(generator=generator)
    return (logits.float().softmax(-1) / waiting).argmax(-1, keepdim=True)
