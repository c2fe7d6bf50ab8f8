"""Texts to calibrate and to measure on: files of plain text, and those that packages carry."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from armorfact_hf.data import demo_text
from armorfact_hf.data.load_model import Loaded, Log
from armorfact_hf.data.tokens import tokenize


@dataclass(frozen=True)
class Text:
    """A text and what is said of it where its figures are shown.

    Args:
        name, split: which text, which part of it.
        content: the text.
    """

    name: str
    split: str
    content: str


def calibration_source(name: str, log: Log = print) -> Text:
    """The text to calibrate on: a file of plain text, or "demo:gensim-enwiki" without its held-out articles.

    Raises:
        ValueError: an unknown name, or an empty or unreadable file.
    """
    if name == "demo:gensim-enwiki":
        return Text("gensim-enwiki", "four of five articles", demo_text.calibration_text(log))
    return _text_file(name, "demo:gensim-enwiki")


def evaluation_source(name: str, log: Log = print) -> Text:
    """The text to measure perplexity on: a file, "demo:gensim-enwiki" (held-out articles) or "demo:qasper".

    Raises:
        ValueError: an unknown name, or an empty or unreadable file.
    """
    if name == "demo:gensim-enwiki":
        return Text("gensim-enwiki", "every fifth article, held out", demo_text.held_out_text(log))
    if name == "demo:qasper":
        return Text("qasper", "all papers", demo_text.fetch_second_domain(log))
    return _text_file(name, "demo:gensim-enwiki, demo:qasper")


def _text_file(name: str, known: str) -> Text:
    path = Path(name)
    if not path.is_file():
        raise ValueError(f"{name!r} is no text file, and none of the demo texts: {known}")
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {path} as UTF-8 text ({error}): convert it, or name another file") from error
    if not content.strip():
        raise ValueError(f"{path} holds no text: name a file with some")
    return Text(path.name, "whole file", content)


def tokens_of(text: Text, loaded: Loaded) -> Any:
    """The token numbers of a text, (n,) int64, without special tokens.

    Raises:
        ValueError: the tokenizer makes none of it.
    """
    tokens = tokenize(text.content, loaded.tokenizer)
    if not len(tokens):
        raise ValueError(f"the tokenizer of {loaded.name} makes no tokens of {text.name}: is it the model's own?")
    return tokens
