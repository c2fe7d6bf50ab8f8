"""Prices against plain automatic differentiation through the whole model, and against the divergence they foretell."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional

from armorfact import sparsegpt
from armorfact_hf.observer import Observer
from armorfact_hf.pruning import job as jobs
from armorfact_hf.pruning import prices as module
from armorfact_hf.pruning import prune
from armorfact_hf.pruning.config import PruneConfig
from armorfact_hf.pruning.job import PRICED_WINDOWS, make_job
from armorfact_hf.pruning.prices import fisher_samples, prices
from armorfact_hf.pruning.progress import Progress
from armorfact_hf.pruning.prune import prune_
from tests.hf.models import BLOCKS, FAMILIES, random_tokens, tiny_model

WIDE = {"hidden_size": 96, "intermediate_size": 192}


def job_of(family="llama", windows=4, **config):
    return make_job(tiny_model(family), random_tokens(windows), PruneConfig(block="priced", **config))


def quiet():
    return Progress(Observer(), 0)


def through_the_whole_model(job):
    """The same prices, from one backward pass a window through all of the model."""
    inputs, outputs = {}, {}
    modules = {layer.name: layer for layer in job.priced}

    def note(name):
        def hook(_, given, output):
            inputs.setdefault(name, []).append(given[0].detach().flatten(0, -2))
            outputs.setdefault(name, []).append(output)

        return hook

    for name, layer in modules.items():
        layer.module.register_forward_hook(note(name))
    gradients = {name: [] for name in modules}
    for window, tokens in enumerate(job.priced_tokens.split(1)):
        logits = job.model(input_ids=tokens, use_cache=False).logits[0]
        generator = torch.Generator().manual_seed(window)
        words = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
        likelihood = -functional.cross_entropy(logits, words, reduction="sum")
        found = torch.autograd.grad(likelihood, [outputs[name][window] for name in modules])
        for name, gradient in zip(modules, found, strict=True):
            gradients[name].append(gradient.flatten(0, -2))
    return {name: _price(modules[name], torch.cat(inputs[name]), torch.cat(gradients[name])) for name in modules}


def _price(layer, x, g):
    gram = x.T @ x
    pruned = sparsegpt(layer.weight, gram + gram.diagonal().diag())
    return float(((g * (x @ (layer.weight - pruned).T)).sum(1) ** 2).mean()) / 2


@pytest.mark.parametrize("family", FAMILIES)
def test_they_are_those_of_one_pass_through_the_whole_model(family):
    found = prices(job_of(family), quiet(), None)
    expected = through_the_whole_model(job_of(family))
    assert found.keys() == expected.keys()
    for name, price in found.items():
        assert price == pytest.approx(expected[name], rel=1e-3), name


def test_states_on_disk_change_no_bit(tmp_path):
    assert prices(job_of(), quiet(), tmp_path) == prices(job_of(), quiet(), None)


def test_a_small_error_costs_about_what_is_foretold():
    torch.manual_seed(0)
    model, tokens = tiny_model("llama", hidden_size=64, intermediate_size=128), random_tokens(16, 60)
    job = make_job(model, tokens, PruneConfig(block="priced"))
    seen = {one.layer.name: one for one in fisher_samples(job, quiet(), None)}
    for name in [name for name in seen if name.endswith("v_proj")]:
        del seen[
            name
        ]  # a random model attends evenly, so that errors of values add up over tokens: prices take each alone
    noise = {name: 0.1 * torch.randn_like(one.weight) * one.weight.std() for name, one in seen.items()}
    foretold = {name: one.divergence(one.weight + noise[name]) for name, one in seen.items()}
    with torch.no_grad():
        dense = model(input_ids=job.priced_tokens).logits.double().log_softmax(-1)
        costs = {}
        for name, error in noise.items():
            changed = copy.deepcopy(model)
            changed.get_submodule(name).weight += error
            said = changed(input_ids=job.priced_tokens).logits.double().log_softmax(-1)
            costs[name] = float((dense.exp() * (dense - said)).sum(-1).mean())
    ratios = torch.tensor([foretold[name] / costs[name] for name in noise])
    assert 0.8 < float(ratios.log().mean().exp()) < 1.25
    assert float(ratios.min()) > 0.4 and float(ratios.max()) < 2.5  # 240 words are drawn: each has an error of its own


def test_a_few_short_windows_are_looked_at(monkeypatch):
    job = make_job(tiny_model("llama"), random_tokens(9, 40), PruneConfig(block="priced"))
    assert len(job.priced_tokens) == 3 <= PRICED_WINDOWS
    assert torch.equal(job.priced_tokens, job.tokens[::3])
    monkeypatch.setattr(jobs, "PRICED_LENGTH", 16)
    assert torch.equal(job.priced_tokens, job.tokens[::3, :16])


@pytest.mark.parametrize("config", [{"block": "auto", "sweeps": 1}, {"block": 8, "sweeps": 1}, {"method": "wanda"}])
def test_none_are_found_where_they_choose_nothing(config, monkeypatch):
    monkeypatch.setattr(prune, "prices", None)
    report = prune_(tiny_model("llama"), random_tokens(), PruneConfig(refine=None, **config))
    assert len(report.layers) == 7 * BLOCKS


def test_a_mixture_of_experts_has_none(monkeypatch):
    monkeypatch.setattr(prune, "prices", None)
    prune_(tiny_model("mixtral"), random_tokens(), PruneConfig(sweeps=1, refine=None, block="priced"))


def test_blocks_differ_add_up_to_no_more_and_what_is_stored_says_so(tmp_path):
    reports = {}
    for block in ("priced", "auto"):
        model = tiny_model("llama", **WIDE)
        reports[block] = prune_(model, random_tokens(), PruneConfig(sweeps=1, refine=None, block=block))
        assert model.get_submodule(reports[block].layers[0].name).block == reports[block].layers[0].block
    priced, auto = (sum(layer.bytes for layer in reports[block].layers) for block in ("priced", "auto"))
    assert [x.block for x in reports["priced"].layers] != [x.block for x in reports["auto"].layers]
    assert 0.95 * auto < priced <= auto


def test_what_is_not_finite_is_no_price(monkeypatch):
    found = iter([float("inf"), float("nan"), 1.0])
    monkeypatch.setattr(module.FisherSample, "divergence", lambda *_: next(found, 2.0))
    assert sorted(prices(job_of(), quiet(), None).values()) == [1.0] + [2.0] * (7 * BLOCKS - 3)


def test_they_stand_in_the_journal(tmp_path, monkeypatch):
    config = PruneConfig(sweeps=1, refine=None, block="priced")
    first = prune_(tiny_model("llama", **WIDE), random_tokens(), config, journal=tmp_path / "journal")
    assert (tmp_path / "journal" / "prices.safetensors").exists()
    for path in (tmp_path / "journal").glob("block-*"):
        path.unlink()
    monkeypatch.setattr(prune, "prices", None)
    again = prune_(tiny_model("llama", **WIDE), random_tokens(), config, journal=tmp_path / "journal")
    assert [x.block for x in again.layers] == [x.block for x in first.layers]
    assert [x.losses for x in again.layers] == [x.losses for x in first.layers]


def test_a_model_that_passes_no_gradients_on_is_refused_with_the_way_out():
    model = tiny_model("llama")
    block = model.model.layers[1]
    forward = block.forward
    block.forward = lambda *args, **kwargs: forward(*args, **kwargs).detach()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"passes no gradients on.*block='auto'"):
        make_job(model, random_tokens(), PruneConfig(block="priced", refine=None))  # before any work
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not model.get_input_embeddings()._forward_hooks


def test_a_large_vocabulary_is_looked_at_in_part(monkeypatch):
    whole = prices(job_of(windows=4), quiet(), None)
    monkeypatch.setattr(module, "LOGITS_A_STEP", 24 * 96 // 2)
    part = prices(job_of(windows=4), quiet(), None)
    ratios = torch.tensor([part[name] / whole[name] for name in whole])
    assert 0.4 < float(ratios.log().mean().exp()) < 2.5 and part != whole
