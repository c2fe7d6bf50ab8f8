"""The ways to prune: output-weighted objectives by scaling, one pass on a fixed mask, and a layer's KL divergence."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from armorfact_hf.model.structure import chosen_layers
from armorfact_hf.pruning.layer import shrunk
from benchmarks.evidence.divergence import Divergence
from benchmarks.evidence.methods import METHODS, OBJECTIVES, SWEEPS, Subject, output_weighted
from benchmarks.evidence.one_pass import OnePass, solved_values
from benchmarks.evidence.proxies import Grams
from benchmarks.evidence.traces import Trace
from tests.conftest import random_factors, random_problem
from tests.hf.models import random_tokens, tiny_model


def subject(seed=0, d_out=32, d_in=64, tokens=200, block=8):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(tokens, d_in, generator=generator) * torch.linspace(0.2, 3, d_in)
    gradients = torch.randn(tokens, d_out, generator=generator) * torch.linspace(0.1, 4, d_out)
    mixed = gradients @ torch.randn(d_out, d_out, generator=generator)
    rows = mixed.reshape(tokens, -1, block).double()
    gram = torch.einsum("tbi,tbj->bij", rows, rows) / tokens
    trace = Trace([inputs], [mixed.square().mean(1)], gram)
    return Subject(torch.randn(d_out, d_in, generator=generator), Grams(trace))


def damped_loss(given_subject, residual):
    """What `output_weighted` minimizes."""
    blocks = given_subject.grams.trace.output_gram
    eye = torch.eye(blocks.shape[1]).double()
    output = torch.block_diag(*(blocks / blocks.diagonal(dim1=1, dim2=2).mean() + 0.01 * eye))
    gram = shrunk(given_subject.grams.plain, 1.0)
    return float((output @ residual.double() @ gram * residual.double()).sum())


@pytest.fixture(autouse=True)
def wrapped(monkeypatch):
    """Wrappers of 8 x 8 on layers that are too small for "auto" to give any."""
    monkeypatch.setattr(Subject, "block", (8, 8))


@pytest.mark.parametrize("seed", range(3))
def test_the_output_weighted_minimizer_is_below_sparsegpt_and_below_ours_in_its_objective(seed):
    case = subject(seed)
    weighted = output_weighted(case, case.grams.plain)
    ours = METHODS["armorfact"](case)
    start = case.ours(case.grams.plain, sweeps=0).dense()
    losses = [damped_loss(case, case.weight - found) for found in (weighted, ours, start)]
    assert losses[0] < losses[1] < losses[2]


def test_isotropic_output_gradients_leave_our_result():
    case = subject()
    trace = case.grams.trace
    case = Subject(case.weight, Grams(Trace(trace.inputs, trace.importance, torch.eye(8).double().repeat(4, 1, 1))))
    torch.testing.assert_close(
        output_weighted(case, case.grams.plain), METHODS["armorfact"](case), rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("name", [*METHODS, *OBJECTIVES, *SWEEPS])
def test_every_way_gives_a_weight_that_is_closer_than_zero(name):
    case = subject()
    found = ({**METHODS, **OBJECTIVES, **SWEEPS})[name](case)
    assert found.shape == case.weight.shape
    energies = case.grams.energies(case.weight - found, case.weight)
    assert energies["H"] < case.grams.energies(case.weight, case.weight)["H"]


def test_more_sweeps_lower_the_objective():
    case = subject()
    gram = shrunk(case.grams.plain, 1.0)
    losses = []
    for name in ("sparsegpt", "one pass", "5 sweeps", "100 sweeps"):
        residual = (case.weight - SWEEPS[name](case)).double()
        losses.append(float((residual @ gram * residual).sum()))
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0]


@given(seed=st.integers(0, 200), diagonal=st.booleans())
def test_values_are_optimal_on_their_support(seed, diagonal):
    """The gradient vanishes there, and the support is what it was."""
    problem = random_problem(seed, diagonal=diagonal)
    factors = random_factors(problem, seed + 1)
    solved = solved_values(problem, factors, iterations=400)
    assert problem.loss(solved) <= problem.loss(factors) * (1 + 1e-12)
    assert not np.any((factors.core == 0) & (solved.core != 0))
    for entry in np.argwhere(factors.core != 0)[:10]:
        for step in (1e-3, -1e-3):
            moved = solved.core.copy()
            moved[tuple(entry)] += step
            assert problem.loss(solved.replace(core=moved)) >= problem.loss(solved) * (1 - 1e-6)


def test_one_pass_keeps_the_mask():
    case = subject()
    start = case.ours(case.grams.plain, sweeps=0)
    solved = case.ours(case.grams.plain, sweeps=1, rtol=0.0, solver=OnePass())
    assert torch.equal(start.core.dense() != 0, solved.core.dense() != 0)
    assert solved.loss < start.loss


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
@torch.no_grad()
def test_the_divergence_is_that_of_the_whole_model(family):
    model, tokens = tiny_model(family), random_tokens(windows=2)
    layers = chosen_layers(model)[0]
    dense = model(input_ids=tokens).logits.double().log_softmax(-1)
    divergence = Divergence(model, tokens, range(3))
    for layer in (layers[0], layers[-1]):
        kept = layer.weight.clone()
        changed = kept + 0.05 * torch.randn(kept.shape, generator=torch.Generator().manual_seed(0))
        found = divergence.of(layer, changed)
        assert torch.equal(layer.weight, kept)
        layer.weight.copy_(changed)
        pruned = model(input_ids=tokens).logits.double().log_softmax(-1)
        layer.weight.copy_(kept)
        expected = (dense.exp() * (dense - pruned)).sum(-1).mean(-1)
        assert found == pytest.approx(expected.tolist(), rel=1e-3, abs=1e-8)
        assert divergence.of(layer, kept) == pytest.approx([0, 0], abs=1e-9)


@torch.no_grad()
def test_every_so_manieth_position_is_scored():
    model, tokens = tiny_model("llama"), random_tokens(windows=1)
    layer = chosen_layers(model)[0][0]
    changed = layer.weight + 0.1
    dense = model(input_ids=tokens).logits[0].double().log_softmax(-1)
    found = Divergence(model, tokens, [0], every=5).of(layer, changed)
    layer.weight.copy_(changed)
    pruned = model(input_ids=tokens).logits[0].double().log_softmax(-1)
    expected = (dense.exp() * (dense - pruned)).sum(-1)[::5].mean()
    assert found == pytest.approx([float(expected)], rel=1e-3)
