"""Texts to calibrate and to measure on: files of plain text, and those that packages carry."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from armorfact_hf.data import demo_text
from armorfact_hf.data.load_model import Loaded
from armorfact_hf.data.origin import DEMO
from armorfact_hf.data.tokens import tokenize
from armorfact_hf.observer import Log


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
    """The text to calibrate on: a file of plain text, or one of `TO_CALIBRATE` without what is held out of it.

    Raises:
        ValueError: an unknown name, or an empty or unreadable file.
    """
    return _source(name, TO_CALIBRATE, log)


def evaluation_source(name: str, log: Log = print) -> Text:
    """The text to measure perplexity on: a file, or what is held out of one of `TO_MEASURE`.

    Raises:
        ValueError: an unknown name, or an empty or unreadable file.
    """
    return _source(name, TO_MEASURE, log)


Source = tuple[str, Callable[[Log], str]]  # which part of a text, and what fetches it
TO_CALIBRATE: dict[str, Source] = {
    "gensim-enwiki": ("four of five articles", lambda log: demo_text.for_calibration(demo_text.fetch_articles(log))),
    "python": ("four of five modules", lambda log: demo_text.library_text(held_out=False)),
}
TO_MEASURE: dict[str, Source] = {
    "gensim-enwiki": ("every fifth article, held out", lambda log: demo_text.held_out(demo_text.fetch_articles(log))),
    "qasper": ("all papers", lambda log: demo_text.fetch_second_domain(log)),
    "python": ("about every fifth module, held out", lambda log: demo_text.library_text(held_out=True)),
}


def check_name(name: str, known: Mapping[str, Source] = TO_MEASURE) -> None:
    """Raise ValueError if there is no text of that name to measure on, or of those ``known``; nothing is fetched."""
    if not (name.startswith(DEMO) and name.removeprefix(DEMO) in known):
        _source(name, known, lambda _: None)


def _source(name: str, known: Mapping[str, Source], log: Log) -> Text:
    demo = name.removeprefix(DEMO)
    if demo != name and demo in known:
        split, fetch = known[demo]
        return Text(demo, split, fetch(log))
    return _text_file(name, ", ".join(DEMO + each for each in known))


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
