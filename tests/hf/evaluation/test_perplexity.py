"""Perplexity equals that of the obvious computation, with and without overlap, bos and scaled or capped logits."""

from __future__ import annotations

import math

import pytest
import torch
import transformers
from torch.nn import functional

from armorfact_hf.evaluation import perplexity
from armorfact_hf.evaluation.perplexity import evaluate_perplexity, spread
from armorfact_hf.model.nonfinite import NonFiniteActivations
from tests.hf.models import COMMON, FAMILIES, GROUPED, TOKENS, random_tokens, tiny_model

TEXT = random_tokens(1, 100)[0]


@torch.no_grad()
def obvious(model, windows):
    """exp of the mean loss over (tokens, how many of the last count) pairs, from whole logits."""
    losses = []
    for row, count in windows:
        logits = model(input_ids=row[None]).logits[0].float()
        losses.append(functional.cross_entropy(logits[:-1], row[1:], reduction="none")[-count:])
    return math.exp(torch.cat(losses).double().mean())


@pytest.mark.parametrize("family", FAMILIES)
def test_whole_windows(family, monkeypatch):
    monkeypatch.setattr(perplexity, "POSITIONS_AT_ONCE", 7)
    model = tiny_model(family)
    found = evaluate_perplexity(model, TEXT, window=24)
    expected = obvious(model, [(TEXT[lo : lo + 24], 23) for lo in range(0, 96, 24)])
    assert found.value == pytest.approx(expected, rel=1e-5)
    assert (found.tokens, found.window, found.stride, found.bos) == (4 * 23, 24, 24, None)


def test_logits_that_the_model_caps_are_capped():
    torch.manual_seed(0)
    config = transformers.Gemma2Config(**COMMON, **TOKENS, **GROUPED, head_dim=8, final_logit_softcapping=0.1)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    found = evaluate_perplexity(model, TEXT, window=50)
    assert found.value == pytest.approx(obvious(model, [(TEXT[:50], 49), (TEXT[50:], 49)]), rel=1e-5)


def test_overlapping_windows_score_every_token_once():
    model = tiny_model("llama")
    found = evaluate_perplexity(model, TEXT, window=40, stride=20)
    expected = obvious(model, [(TEXT[:40], 39)] + [(TEXT[lo : lo + 40], 20) for lo in (20, 40, 60)])
    assert found.value == pytest.approx(expected, rel=1e-5)
    assert found.tokens == 99


def test_a_bos_heads_every_window_and_lets_every_token_be_scored():
    model = tiny_model("llama")
    found = evaluate_perplexity(model, TEXT, window=26, bos=1)
    rows = [torch.cat([torch.tensor([1]), TEXT[lo : lo + 25]]) for lo in range(0, 100, 25)]
    assert found.value == pytest.approx(obvious(model, [(row, 25) for row in rows]), rel=1e-5)
    assert found.tokens == 100


def test_a_few_windows_are_spread_over_the_text():
    model, told = tiny_model("llama"), []
    found = evaluate_perplexity(model, TEXT, window=10, max_windows=2, progress=lambda *step: told.append(step))
    assert found.value == pytest.approx(obvious(model, [(TEXT[:10], 9), (TEXT[50:60], 9)]), rel=1e-5)
    assert told == [(1, 2), (2, 2)]


@pytest.mark.parametrize(("count", "expected"), [(None, [0, 1, 2, 3, 4]), (9, [0, 1, 2, 3, 4]), (2, [0, 2]), (1, [0])])
def test_spread(count, expected):
    assert spread(range(5), count) == expected


@pytest.mark.parametrize(
    ("tokens", "settings", "message"),
    [
        (TEXT[None], {"window": 10}, "expected a vector"),
        (TEXT.float(), {"window": 10}, "float32"),
        (TEXT, {"window": 101}, "one window needs 101 tokens of text, got 100"),
        (TEXT, {"window": 1}, "two tokens of text"),
        (TEXT, {"window": 10, "stride": 0}, "stride from 1 to 10"),
        (TEXT, {"window": 10, "stride": 11}, "stride from 1 to 10"),
        (TEXT, {"window": 10, "max_windows": 0}, "positive number of windows"),
    ],
)
def test_bad_input(tokens, settings, message):
    with pytest.raises(ValueError, match=message):
        evaluate_perplexity(tiny_model("llama"), tokens, **settings)


def test_a_model_that_computes_nan_has_no_perplexity():
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight[3, 3] = float("nan")
    with pytest.raises(NonFiniteActivations, match="computes NaN"):
        evaluate_perplexity(model, TEXT, window=10)
