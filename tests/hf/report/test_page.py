"""The page loads nothing, escapes everything, and shows the numbers of the report whatever is missing from it."""

import math
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise

import pytest

from armorfact_hf.pruning.config import PruneConfig
from armorfact_hf.pruning.tuning.matching import BlockReport
from armorfact_hf.recovery.report import Recovery
from armorfact_hf.recovery.settings import RecoverySettings
from armorfact_hf.report.page import duration, render_html, size
from armorfact_hf.report.plots import FRAME, log_axis, shortened, spread
from armorfact_hf.report.record import Report
from armorfact_hf.typed_json import from_json, to_json
from tests.hf.report.records import HOSTILE, evaluation, layer, record

VOID_TAGS = {"meta", "wbr"}


class Page(HTMLParser):
    """The tags of a page, its table rows as lists of cell texts, and all its text."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.open, self.rows, self.words = [], [], [], []
        self.feed(html)
        self.close()
        assert not self.open

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID_TAGS:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert tag == self.open.pop()

    def handle_data(self, data):
        if "style" in self.open:
            return
        self.words.append(data)
        if "td" in self.open or "th" in self.open:
            self.rows[-1][-1] += data.strip()

    def count(self, tag):
        return sum(tag == other for other, _ in self.tags)

    def row(self, first):
        """The last row whose first cell reads `first`."""
        return [row for row in self.rows if row[0] == first][-1]


@pytest.fixture
def report():
    return record()


def test_page_loads_nothing(report):
    page = Page(render_html(report))
    assert page.count("script") == page.count("link") == page.count("img") == 0
    for tag, attributes in page.tags:
        assert not attributes.keys() & {"src", "href", "xlink:href", "onload"}, tag
    policy = next(attributes for tag, attributes in page.tags if attributes.get("http-equiv"))
    assert policy["content"].startswith("default-src 'none'")
    assert "url(" not in render_html(report) and "@import" not in render_html(report)


def test_numbers_shown_are_those_of_the_report(report):
    page = Page(render_html(report))
    for given in report.layers:
        losses = [f"{loss:#.4g}" for loss in given.losses.values()]
        assert page.row(given.name) == [
            *(given.name, "192 × 576", "32 × 64"),
            *losses,
            *("7", "1.2", "300,000", "0.678", "sweep limit of 7 reached"),
        ]
    assert [row for row in page.rows if len(row) == 4][1:] == [
        ["dense", "20.00", "1.000", "–"],
        ["armorfact", "40.00", "2.000", "0.02000"],
        ["wanda", "160.50", "8.025", "0.08025"],
    ]
    assert page.row("piqa") == ["piqa", "100", "0.670", "0.600", "0.048"]
    assert page.row("lm_head") == ["lm_head", "the head was not asked for"]
    for phrase in ("20.00 → 40.00", "2.000 × dense", "3.539 MB → 2.4 MB", "0.678 of dense", "11.0%", "134,515,008"):
        assert phrase in page.text
    for phrase in ("fe" * 32, "ca" * 32, '["re:.*"]', "armorfact has the lowest loss on 8 of 8 layers"):
        assert phrase in page.text


def test_summary_of_losses(report):
    losses = [given.losses["wanda"] for given in report.layers]
    row = next(row for row in Page(render_html(report)).rows if row[0] == "wanda" and row[1] == "8")
    assert row == ["wanda", "8", f"{sum(losses) / 8:#.4g}", f"{max(losses):#.4g}", "model.layers.3.mlp.down_proj"]


def test_whatever_text_is_escaped(report):
    def spoil(value):
        if isinstance(value, dict):
            return {key: spoil(item) for key, item in value.items()}
        if isinstance(value, list):
            return [spoil(item) for item in value]
        return value + HOSTILE if isinstance(value, str) else value

    first, *rest = report.layers
    noted = replace(first, notes=("damped",), losses={**first.losses, HOSTILE: 0.5})
    report = replace(report, layers=(noted, *rest))
    config = replace(report.config, include=(HOSTILE,))
    object.__setattr__(config, "method", HOSTILE)  # no config lets these through
    object.__setattr__(config, "pattern", HOSTILE)
    spoiled = from_json(
        Report, spoil(to_json(replace(report, config=PruneConfig()))) | {"config": to_json(PruneConfig())}
    )
    spoiled = replace(spoiled, config=config)
    page, plain = Page(render_html(spoiled)), Page(render_html(report))
    assert page.count("script") == 0 and "<script>alert" in page.text and "{{ 7 * 7 }}" in page.text
    assert {tag for tag, _ in page.tags} <= {tag for tag, _ in plain.tags}
    assert {key for _, attributes in page.tags for key in attributes} <= {
        key for _, attributes in plain.tags for key in attributes
    }


def test_what_the_losses_are_of_and_what_recovery_did(report):
    outputs = replace(report, config=replace(report.config, target="output"))
    assert "W are the weights, R what" in Page(render_html(report)).text
    assert "W are the weights that give the dense model's outputs" in Page(render_html(outputs)).text
    done = Recovery(RecoverySettings(), 9, 1, 12, 288, 0.1, 0.05, 8, ((0, 0.1), (8, 0.05)), 3.0)
    text = Page(render_html(replace(report, recovery=done))).text
    assert "towards what the dense model says" in text and "at step 8" in text and "Mean relative loss before" in text
    nothing = replace(done, after=0.1, best_step=0, teacher="./another")
    text = Page(render_html(replace(report, recovery=nothing))).text
    assert "towards what ./another says" in text and "no step was better than the start" in text


def test_without_evaluations_and_tasks(report):
    page = Page(render_html(replace(report, evaluations=(), tasks=())))
    assert "Perplexity was not measured" in page.text and "Tasks" not in page.text
    assert page.count("svg") == 3  # over depth, and a panel for each of two kinds


def test_evaluation_without_the_stored_method(report):
    page = Page(render_html(replace(report, evaluations=(evaluation(wanda=160.5),))))
    assert "20.00 →" not in page.text and ["wanda", "160.50", "8.025", "0.08025"] in page.rows


def test_perplexity_that_overflowed_is_shown_but_not_drawn(report):
    page = Page(render_html(replace(report, evaluations=(evaluation(armorfact=40.0, wanda=math.inf),))))
    assert "is missing or not finite: wanda." in page.text
    assert ["wanda", "inf", "inf", "inf"] in page.rows


def test_notes_stand_above_the_table_and_under_their_layer(report):
    layers = list(report.layers)
    layers[1] = replace(layers[1], notes=("damping was doubled 3 times",))
    layers[2] = replace(layers[2], notes=("damping was doubled 3 times", "dead inputs"))
    page = Page(render_html(replace(report, layers=tuple(layers))))
    assert "damping was doubled 3 times (2 layers)" in page.text and "dead inputs (1 layer)" in page.text
    below = page.rows.index(page.row(layers[2].name)) + 1
    assert page.rows[below] == ["damping was doubled 3 times; dead inputs"]


def test_layers_without_some_methods_blocks_or_depth(report):
    layers = [*report.layers, replace(layer(0, "x"), name="lm_head", decoder_block=None, block=None)]
    del layers[2].losses["wanda"], layers[3].losses["wanda"]
    page = Page(render_html(replace(report, layers=tuple(layers))))
    assert page.row(layers[2].name)[4] == "–"
    assert page.rows[[row[0] for row in page.rows].index("lm_head")][2] == "–"
    assert "outside the decoder blocks: lm_head." in page.text
    wanda = next(attributes["d"] for tag, attributes in page.tags if tag == "path")
    assert wanda.count("M") == 2  # block 1 is missing: the line is broken there


def test_an_int8_core_has_its_loss_before_beside_it(report):
    layers = tuple(replace(layer, unrounded_loss=0.00123) for layer in report.layers)
    page = Page(render_html(replace(report, layers=layers, config=PruneConfig(core_dtype="int8"))))
    assert "Before int8" in page.text and "0.00123" in page.text
    assert "Before int8" not in Page(render_html(report)).text


def test_method_without_wrappers(report):
    layers = tuple(replace(given, block=None, sweeps=0) for given in report.layers)
    page = Page(render_html(replace(report, config=PruneConfig(method="wanda"), layers=layers)))
    assert "wanda pruned 8 linear layers of a LlamaForCausalLM" in page.text
    assert "to 2:4 sparsity" in page.text and "sparse core" not in page.text


@pytest.mark.parametrize("loss", [0.0, 1e-9, 0.033, math.nan])
def test_one_layer(report, loss):
    only = replace(layer(5, "q_proj"), losses={"armorfact": loss})
    page = Page(render_html(replace(report, layers=(only,), dense_layers=())))
    shown = "0" if loss == 0 else f"{loss:#.4g}"
    assert page.row(only.name)[3] == shown
    assert "every linear layer was pruned" in page.text and "compared with" not in page.text


def test_no_layers(report):
    assert "pruned 0 linear layers" in Page(render_html(replace(report, layers=()))).text


def test_hundreds_of_layers_and_many_kinds(report):
    layers = tuple(layer(block, f"experts.w{kind}") for block in range(30) for kind in range(14))
    page = Page(render_html(replace(report, layers=layers)))
    assert {given.name for given in layers} <= {row[0] for row in page.rows}
    assert page.count("svg") == 2  # 14 panels would be too many to read


@pytest.mark.parametrize(
    "losses", [[0.01], [0.0], [], [0.0, 0.1], [1e-14, 0.5], [0.031, 0.039], [-1e-18, 1.0], [1e-200, 1e200]]
)
def test_log_axis_holds_its_values_and_a_few_rising_ticks(losses):
    axis = log_axis(losses, FRAME.bottom, FRAME.top)
    assert all(FRAME.top <= axis(loss) <= FRAME.bottom for loss in losses)
    assert 2 <= len(axis.ticks) <= 8
    assert all(low.at > high.at for low, high in pairwise(axis.ticks))
    assert all(FRAME.top <= tick.at <= FRAME.bottom for tick in axis.ticks)
    assert ("0" in [tick.text for tick in axis.ticks]) == any(loss <= 0 for loss in losses)


def test_spread_labels_keep_their_order_and_distance():
    placed = spread([50.0, 10.0, 51.0, 99.0], 15, 0, 100)
    assert placed == [50.0, 10.0, 65.0, 99.0]
    assert spread([99.0, 98.0], 15, 0, 100) == [100, 85]


def test_words():
    assert [size(count) for count in (None, 0, 999, 1000, 999_999, 538_060_032)] == [
        *("–\xa0bytes", "0\xa0bytes", "999\xa0bytes", "1\xa0kB", "1000\xa0kB", "538.1\xa0MB"),
    ]
    assert [duration(seconds) for seconds in (None, 1.25, 310.0, 7322)] == [
        *("–\xa0s", "1.2\xa0s", "5\xa0min\xa010\xa0s", "2\xa0h\xa02\xa0min"),
    ]
    assert shortened("armorfact") == "armorfact" and len(shortened("a" * 100)) == 13


@pytest.mark.parametrize("core_dtype", [None, "int8"])
def test_every_tuned_block_has_a_row(core_dtype):
    blocks = (
        BlockReport(0, 0.04, 0.03, True, rounded=0.031),
        BlockReport(2, 0.5, 0.6, False, ("step 3 was not finite",), "nats a token", 3),
    )
    page = Page(render_html(replace(record(), config=PruneConfig(core_dtype=core_dtype), blocks=blocks)))
    rows = [cells for cells in page.rows if cells[0] in ("0", "2 to 3")]
    extra = [[], []] if core_dtype is None else [["0.03100"], ["–"]]
    assert rows == [
        ["0", "0.04000", "0.03000", "0.750", *extra[0], "relative error", "tuned"],
        ["2 to 3", "0.5000", "0.6000", "1.200", *extra[1], "nats a token", "as before; step 3 was not finite"],
    ]
    assert "1 of 2 keep their tuned factors" in page.text
