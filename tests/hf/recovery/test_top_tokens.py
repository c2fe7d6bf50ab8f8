"""The divergence by the likeliest words is what it says, never above the whole one, and survives its rounding."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from armorfact_hf.recovery.top_tokens import BYTES_A_WORD, TopTokens

VOCABULARY = 12


def spoken(seed: int, spread: float, positions: int = 3) -> Tensor:
    """Logarithms of probabilities, (positions, VOCABULARY) float64; a large spread leaves most words without any."""
    generator = torch.Generator().manual_seed(seed)
    return functional.log_softmax(
        spread * torch.randn(positions, VOCABULARY, dtype=torch.float64, generator=generator), -1
    )


def whole(said: Tensor, taught: Tensor) -> Tensor:
    return (taught.exp() * (taught - said)).sum()


def naive(said: Tensor, taught: Tensor, count: int) -> Tensor:
    """As it is written, a position at a time."""
    total = torch.zeros((), dtype=torch.float64)
    for q, p in zip(said.exp(), taught.exp(), strict=True):
        kept = sorted(range(len(p)), key=lambda word: -float(p[word]))[:count]
        pairs = [(p[word], q[word]) for word in kept]
        others = [word for word in range(len(p)) if word not in kept]
        pairs += [(p[others].sum(), q[others].sum())] if others else []
        total = total + torch.stack([a * (a / b).log() for a, b in pairs]).sum()
    return total


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 1000), st.integers(1, VOCABULARY), st.floats(0.1, 8))
def test_it_is_never_above_the_whole_divergence_and_grows_with_the_words(seed, count, spread):
    said, taught = spoken(seed, spread), spoken(seed + 1, spread)
    found = TopTokens.of(taught, count).divergence(said)
    torch.testing.assert_close(found, naive(said, taught, count), rtol=1e-9, atol=1e-12)
    assert 0 <= found <= whole(said, taught) * (1 + 1e-12)
    if count < VOCABULARY:
        assert found <= TopTokens.of(taught, count + 1).divergence(said) * (1 + 1e-12)


def test_all_words_are_the_whole_divergence_and_its_gradient():
    said, taught = spoken(0, 2.0).requires_grad_(), spoken(1, 2.0)
    found = TopTokens.of(taught, VOCABULARY).divergence(said)
    torch.testing.assert_close(found, whole(said, taught), rtol=1e-12, atol=0)
    (gradient,) = torch.autograd.grad(found, said)
    torch.testing.assert_close(gradient, -taught.exp(), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("count", [1, 5, VOCABULARY - 1])
def test_the_gradient_is_that_of_differences(count):
    said, taught = spoken(0, 2.0).requires_grad_(), TopTokens.of(spoken(1, 2.0), count)
    assert torch.autograd.gradcheck(lambda logits: taught.divergence(functional.log_softmax(logits, -1)), (said,))


def test_the_teacher_itself_is_no_distance_away():
    taught = spoken(3, 3.0)
    assert float(TopTokens.of(taught, 4).divergence(taught)) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("part", [slice(0, 2), slice(1, 5, 2), slice(None)])
def test_parts_of_the_positions(part):
    said, taught = spoken(0, 2.0, 5), spoken(1, 2.0, 5)
    kept = TopTokens.of(taught, 4)
    found = kept.divergence(said[part], part)
    assert torch.equal(kept.at(part).divergence(said[part]), found)
    torch.testing.assert_close(found, naive(said[part], taught[part], 4), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("spread", [1.0, 400.0])
@pytest.mark.parametrize("count", [1, 4, VOCABULARY])
def test_what_is_stored_is_close_and_adds_up(count, spread):
    taught = TopTokens.of(spoken(1, spread).float(), count)
    stored = taught.tensors
    assert sum(stored[name].nbytes for name in ("words", "logs")) == taught.words.numel() * BYTES_A_WORD
    again = TopTokens.from_tensors(**stored)
    assert torch.equal(again.words, taught.words) and again.logs.isfinite().all()
    torch.testing.assert_close(again.logs.exp().sum(-1), torch.ones(3), rtol=0, atol=1e-6)
    torch.testing.assert_close(again.logs.exp(), taught.logs.exp(), rtol=0.01, atol=1e-6)
    assert again.divergence(spoken(2, spread).float()).isfinite()
