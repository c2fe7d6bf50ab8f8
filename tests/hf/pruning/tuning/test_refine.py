"""Whole models with their decoder blocks matched: what the report says is what is stored, and nothing else changes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from armorfact_hf.observer import Observer
from armorfact_hf.pruning.config import PruneConfig
from armorfact_hf.pruning.prune import prune_
from armorfact_hf.pruning.schedule import FIRST, kept_aside
from armorfact_hf.pruning.tuning import aims
from armorfact_hf.pruning.tuning.aims import StateAim, TokenAim, relative_error
from armorfact_hf.pruning.workers import in_process, tuning
from tests.hf.models import BLOCKS, VOCABULARY, random_tokens, tiny_model
from tests.hf.pruning.test_prune import QUICK, grams_seen


def block_states(model, tokens):
    """The states behind every decoder block, by whole forward passes: (blocks) of (windows, length, width)."""
    found = [[] for _ in range(BLOCKS)]
    handles = [
        block.register_forward_hook(lambda _, __, out, k=k: found[k].append(out[0] if isinstance(out, tuple) else out))
        for k, block in enumerate(model.model.layers)
    ]
    with torch.no_grad():
        for window in tokens.split(1):
            model(input_ids=window)
    for handle in handles:
        handle.remove()
    return [torch.cat(states) for states in found]


@pytest.mark.parametrize("propagate", ["pruned", "dense"])
def test_blocks_are_matched_to_the_dense_models_states_and_the_error_is_the_stored_ones(propagate):
    tokens = random_tokens(9)
    dense = block_states(tiny_model("llama"), tokens)
    model = tiny_model("llama")
    report = prune_(model, tokens, PruneConfig(**QUICK, propagate=propagate, tail=0))
    assert [block.decoder_block for block in report.blocks] == list(range(BLOCKS))
    assert {block.unit for block in report.blocks} == {StateAim.unit}
    assert all(block.after < block.before for block in report.blocks if block.kept)
    assert any(block.kept for block in report.blocks)
    # The first block is given the same in both models, and with propagate="pruned" the others what is before them.
    checked = report.blocks if propagate == "pruned" else report.blocks[:1]
    for block, state, target in zip(checked, block_states(model, tokens), dense, strict=False):
        aside = kept_aside(9)
        weights = StateAim(state.__getitem__, target.split(1)).weights
        error = relative_error(state[aside], target[aside], weights)
        assert error == pytest.approx(stored(block), rel=1e-4)


def stored(block):
    """The distance of what is stored from its aim."""
    return block.after if block.kept else block.before


def divergence(dense, model, tokens, every):
    with torch.no_grad():
        p, q = (x.eval()(input_ids=tokens).logits[:, ::every].log_softmax(-1) for x in (dense, model))
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("family", ["llama", "gemma3", "falcon"])
@pytest.mark.parametrize("logits", [2**26, 16 * VOCABULARY])
def test_the_last_blocks_are_tuned_towards_the_words_of_the_dense_model(family, logits, monkeypatch):
    monkeypatch.setattr(aims, "LOGITS_A_STEP", logits)
    model, dense, tokens = tiny_model(family), tiny_model(family), random_tokens(9)
    *blocks, tail = prune_(model, tokens, PruneConfig(**QUICK, tail=2)).blocks
    assert [block.decoder_block for block in blocks] == list(range(BLOCKS))
    assert (tail.decoder_block, tail.through, tail.unit) == (BLOCKS - 2, BLOCKS - 1, TokenAim.unit)
    every = -(-tokens.shape[1] * VOCABULARY // logits)
    assert stored(tail) == pytest.approx(divergence(dense, model, tokens[kept_aside(9)], every), rel=1e-3)
    assert tail.kept == (tail.after < tail.before)


def test_the_last_blocks_end_nearer_to_the_words_than_without():
    dense, tokens = tiny_model("llama"), random_tokens(9)
    found = {}
    for tail in (0, 2, 9):
        prune_(model := tiny_model("llama"), tokens, PruneConfig(**QUICK, tail=tail))
        found[tail] = divergence(dense, model, tokens[kept_aside(9)], 1)
    assert found[2] < found[0] and found[9] < found[0]


def test_a_last_block_of_which_nothing_is_reached_is_not_tuned(tmp_path):
    layers = r"re:.*layers\.0\..*q_proj", "extra"
    for _ in range(2):  # the second time from the journal
        model = tiny_model("llama")
        model.model.layers[-1].extra = nn.Linear(32, 32)
        report = prune_(model, random_tokens(9), PruneConfig(**QUICK, tail=1, include=layers), journal=tmp_path / "j")
        assert [layer.name for layer in report.layers] == ["model.layers.0.self_attn.q_proj"]
        assert [block.decoder_block for block in report.blocks] == [0]
        assert any("no calibration token" in layer.reason for layer in report.dense_layers)


@pytest.mark.parametrize("tail", [2, 9])
def test_a_run_that_is_killed_while_the_last_blocks_wait_ends_with_the_same_bits(tail, tmp_path, monkeypatch):
    config, tokens = PruneConfig(**QUICK, tail=tail), random_tokens(9)
    whole, report = tiny_model("llama"), prune_(tiny_model("llama"), tokens, config)
    prune_(whole, tokens, config)
    killed = tuning.match_block_

    def kill(*args):
        if isinstance(args[2], TokenAim):
            raise KeyboardInterrupt
        return killed(*args)

    monkeypatch.setattr(tuning, "match_block_", kill)
    with pytest.raises(KeyboardInterrupt):
        prune_(tiny_model("llama"), tokens, config, journal=tmp_path / "journal")
    monkeypatch.undo()
    for _ in range(2):  # the second time, all of it is finished
        again = prune_(model := tiny_model("llama"), tokens, config, journal=tmp_path / "journal")
        assert again.blocks == report.blocks
        assert [layer.losses for layer in again.layers] == [layer.losses for layer in report.layers]
        for name, tensor in whole.state_dict().items():
            assert torch.equal(model.state_dict()[name], tensor)


@pytest.mark.parametrize("tail", [0, 2])
def test_a_pruned_head_is_given_what_the_tuned_blocks_make(tail, monkeypatch):
    model, tokens, seen = tiny_model("llama"), random_tokens(9), {}
    work = in_process.prune_layers

    def prune_layers(given, *args):
        seen.update({layer.name: moments.gram for layer, moments in given})
        return work(given, *args)

    monkeypatch.setattr(in_process, "prune_layers", prune_layers)
    report = prune_(model, tokens, PruneConfig(**QUICK, tail=tail, head=True))
    assert report.blocks[-1].kept
    with torch.no_grad():
        x = model.model(input_ids=tokens).last_hidden_state.flatten(0, 1)
    torch.testing.assert_close(seen["lm_head"].float(), x.T @ x, rtol=1e-4, atol=1e-3)


def test_a_last_block_that_is_not_pruned_leaves_the_others_to_the_states():
    config = PruneConfig(**QUICK, tail=1, ignore=(r"re:.*layers\.2\.",))
    report = prune_(tiny_model("llama"), random_tokens(9), config)
    assert [block.unit for block in report.blocks] == [StateAim.unit] * (BLOCKS - 1)


def test_the_first_block_is_tuned_longer():
    model, seen = tiny_model("llama"), []

    class Counting(Observer):
        def step(self, step):
            seen.append(step.doing)

    prune_(model, random_tokens(9), PruneConfig(**QUICK, passes=1), observer=Counting())
    tuned = [sum(f"block {k + 1}, tuned" in doing for doing in seen) for k in range(BLOCKS)]
    assert tuned[0] - tuned[1] == (FIRST - 1) * 8 and tuned[1] == tuned[2]


def test_the_loss_of_a_tuned_layer_is_that_of_what_is_stored(monkeypatch):
    seen = grams_seen(monkeypatch, model := tiny_model("llama"), PruneConfig(**QUICK), windows=9)
    dense = tiny_model("llama")
    layers = prune_(tiny_model("llama"), random_tokens(9), PruneConfig(**QUICK)).layers
    assert any(layer.factorized_loss not in (None, layer.losses["armorfact"]) for layer in layers)
    for layer in layers:
        weight, gram = dense.get_submodule(layer.name).weight.detach().double(), seen[layer.name].gram
        residual = weight - model.get_submodule(layer.name).weight.detach().double()
        loss = torch.trace(residual @ gram @ residual.T) / torch.trace(weight @ gram @ weight.T)
        assert layer.losses["armorfact"] == pytest.approx(float(loss), rel=1e-3)


def test_refine_none_keeps_blocks_as_factorized():
    plain = prune_(tiny_model("llama"), random_tokens(), PruneConfig(**QUICK, refine=None))
    assert plain.blocks == () and all(layer.factorized_loss is None for layer in plain.layers)
    single = prune_(tiny_model("llama"), random_tokens(1), PruneConfig(**QUICK))
    assert single.blocks == ()  # no window can be kept aside


def test_gradients_that_a_model_asks_for_are_asked_for_afterwards():
    model = tiny_model("llama")
    asking = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    prune_(model, random_tokens(), PruneConfig(**QUICK))
    now = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert now == {name for name in asking if name in dict(model.named_parameters()) and "proj" not in name}
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_block_that_passes_no_gradients_is_told_before_any_work(tmp_path):
    model = tiny_model("llama")
    block = model.model.layers[1]
    block.forward = torch.no_grad()(block.forward)
    with pytest.raises(ValueError, match=r"passes no gradients .* prune with refine=None"):
        prune_(model, random_tokens(), PruneConfig(**QUICK), journal=tmp_path / "journal")
    assert not (tmp_path / "journal").exists()
    assert len(prune_(model, random_tokens(), PruneConfig(**QUICK, refine=None)).layers) == 7 * BLOCKS


@pytest.mark.parametrize("cut", ["lm_head", "model.norm"])
def test_a_head_that_passes_no_gradients_is_told_before_any_work(tmp_path, cut):
    model = tiny_model("llama")
    module = model.get_submodule(cut)
    module.forward = torch.no_grad()(module.forward)
    with pytest.raises(ValueError, match=r"head passes no gradients on .* tail=0 \(--tail 0\)"):
        prune_(model, random_tokens(), PruneConfig(**QUICK), journal=tmp_path / "journal")
    assert not (tmp_path / "journal").exists()
    assert prune_(model, random_tokens(), PruneConfig(**QUICK | {"tail": 0})).blocks
