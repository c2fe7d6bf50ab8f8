"""Whole models of every family: prune, save, load, and the same logits; statistics flow as the settings say."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from armorfact_hf.checkpoint.dense import to_dense_
from armorfact_hf.checkpoint.description import NotPruned
from armorfact_hf.checkpoint.folder import load_pruned, save_pruned
from armorfact_hf.layers.linear import FactorizedLinear
from armorfact_hf.model.nonfinite import NonFiniteActivations
from armorfact_hf.pruning.config import PruneConfig
from armorfact_hf.pruning.prune import prune_
from armorfact_hf.pruning.workers.in_process import InProcess
from tests.hf.models import BLOCKS, FAMILIES, random_tokens, tiny_model
from tests.hf.observers import Stepping

QUICK = {"sweeps": 2, "baselines": ("sparsegpt",)}


@torch.no_grad()
def logits(model):
    return model(input_ids=random_tokens(2, seed=9)).logits


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pruned_saved_and_loaded_gives_the_same_logits(family, dtype, tmp_path):
    model = tiny_model(family, dtype=dtype)
    before = logits(model)
    report = prune_(model, random_tokens(), PruneConfig(**QUICK, shrinkage=0.0))
    assert len(report.layers) == sum(isinstance(m, FactorizedLinear) for m in model.modules()) > 0
    assert not any(isinstance(m, nn.Linear) for name, m in model.named_modules() if "head" not in name)
    for layer in report.layers:
        stored = layer.losses["armorfact"]  # of a layer that was tuned with its block, this may be more
        factorized = stored if layer.factorized_loss is None else layer.factorized_loss
        assert factorized <= layer.losses["sparsegpt"] * (1 if dtype == torch.float32 else 1.02)
    after = logits(model)
    assert not torch.equal(before, after)
    save_pruned(model, tmp_path)
    assert torch.equal(logits(load_pruned(tmp_path)), after)
    dense = to_dense_(load_pruned(tmp_path))
    assert [type(m) for m in dense.modules()] == [type(m) for m in tiny_model(family).modules()]
    if dtype == torch.float32:
        torch.testing.assert_close(logits(dense), after, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", ["sparsegpt", "wanda", "magnitude"])
def test_one_shot_methods_too(method, tmp_path):
    model = tiny_model("llama")
    report = prune_(model, random_tokens(), PruneConfig(method=method))
    assert report.mean_loss() == pytest.approx(report.mean_loss(method))
    save_pruned(model, tmp_path)
    assert torch.equal(logits(load_pruned(tmp_path)), logits(model))


def test_a_pruned_head_is_untied_from_the_embedding(tmp_path):
    model = tiny_model("llama")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    embedding = model.model.embed_tokens.weight.clone()
    report = prune_(model, random_tokens(), PruneConfig(**QUICK, head=True))
    assert report.layers[-1].name == "lm_head"
    assert isinstance(model.lm_head, FactorizedLinear)
    assert torch.equal(model.model.embed_tokens.weight, embedding)
    save_pruned(model, tmp_path)
    loaded = load_pruned(tmp_path)
    assert isinstance(loaded.lm_head, FactorizedLinear)
    assert torch.equal(logits(loaded), logits(model))
    dense = to_dense_(loaded)
    torch.testing.assert_close(logits(dense), logits(model), rtol=1e-3, atol=1e-4)
    assert torch.equal(dense.model.embed_tokens.weight, embedding)


def grams_seen(monkeypatch, model, config, windows=4):
    """The moments that every layer was pruned with."""
    seen = {}
    prune = InProcess.prune

    def spy(self, layers, statistics, *more):
        seen.update({layer.name: statistics.of(layer.name) for layer in layers})
        return prune(self, layers, statistics, *more)

    monkeypatch.setattr(InProcess, "prune", spy)
    prune_(model, random_tokens(windows), config)
    return seen


@torch.no_grad()
def inputs_of(model, name, windows):
    """All inputs of a layer, the slow way: whole forward passes."""
    parts = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda _, args: parts.append(args[0].flatten(0, -2)))
    for window in windows.split(1):
        model(input_ids=window)
    hook.remove()
    return torch.cat(parts).double()


LATER = [f"model.layers.{BLOCKS - 1}.{name}" for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")]


@pytest.mark.parametrize("propagate", ["pruned", "dense"])
def test_inputs_come_from_the_blocks_before_as_they_are_said_to_be(monkeypatch, propagate):
    seen = grams_seen(monkeypatch, tiny_model("llama"), PruneConfig(**QUICK, propagate=propagate))
    reference = tiny_model("llama")
    if propagate == "pruned":  # the same run up to the last block
        prune_(reference, random_tokens(), PruneConfig(**QUICK, ignore=(f"re:model.layers.{BLOCKS - 1}",)))
    for name in LATER:
        x = inputs_of(reference, name, random_tokens())
        torch.testing.assert_close(seen[name].gram, x.T @ x, rtol=1e-4, atol=1e-5)


def test_the_output_target_pairs_dense_and_pruned_inputs(monkeypatch):
    config = PruneConfig(**QUICK, target="output")
    seen = grams_seen(monkeypatch, tiny_model("llama"), config)
    dense, reference = tiny_model("llama"), tiny_model("llama")
    prune_(reference, random_tokens(), PruneConfig(**QUICK, target="output", ignore=(f"re:model.layers.{BLOCKS - 1}",)))
    for name in LATER:
        x, y = (inputs_of(model, name, random_tokens()) for model in (dense, reference))
        torch.testing.assert_close(seen[name].cross, x.T @ y, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(seen[name].gram, y.T @ y, rtol=1e-4, atol=1e-5)


def test_only_what_is_included_changes():
    model, dense = tiny_model("llama"), tiny_model("llama")
    report = prune_(model, random_tokens(), PruneConfig(**QUICK, include=("re:.*mlp.*",), ignore=("down_proj",)))
    assert len(report.layers) == 2 * BLOCKS
    assert len(report.dense_layers) == 5 * BLOCKS
    kept = dict(model.named_parameters())
    for name, parameter in dense.named_parameters():
        if "gate_proj" not in name and "up_proj" not in name:
            assert torch.equal(kept[name], parameter)


def test_layers_that_no_block_fits_stay_dense_and_are_named():
    report = prune_(tiny_model("llama", intermediate_size=52), random_tokens(), PruneConfig(**QUICK, block=8))
    named = {layer.name: layer.reason for layer in report.dense_layers}
    assert "these do: [4]" in named["model.layers.0.mlp.up_proj"]
    assert len(report.layers) == 4 * BLOCKS


@pytest.mark.parametrize("settings", [{}, {"target": "output"}, {"propagate": "dense"}])
def test_progress_ends_where_it_said_it_would(settings):
    steps = []
    prune_(tiny_model("llama"), random_tokens(), PruneConfig(**QUICK, **settings), observer=Stepping(steps.append))
    done = [step.done for step in steps]
    assert done == sorted(done) and done[0] == 0
    assert steps[-1].done == steps[-1].total


@torch.no_grad()
def test_nan_activations_name_the_layer_that_made_them():
    model = tiny_model("llama")
    model.model.layers[1].mlp.gate_proj.weight[0] = 3e38  # finite, and too large for sums
    with pytest.raises(NonFiniteActivations, match=r"^model\.layers\.1\.mlp\.gate_proj is the first .* window 0"):
        prune_(model, random_tokens(), PruneConfig(**QUICK, include=("re:.*attn.*",)))
    assert isinstance(model.model.layers[1].self_attn.q_proj, nn.Linear)


@torch.no_grad()
def test_an_embedding_that_overflows_is_named():
    model = tiny_model("gemma3", tie_word_embeddings=False)  # Gemma scales what it looks up
    model.model.embed_tokens.weight[:] = 3e38
    with pytest.raises(NonFiniteActivations, match=r"the embedding, before model\.layers\.0"):
        prune_(model, random_tokens(), PruneConfig(**QUICK))


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        (torch.zeros(3), r"\(windows, length\) matrix"),
        (torch.zeros(2, 3), "float32"),
        (torch.full((2, 3), 96), "vocabulary has 96"),
        (torch.zeros(0, 3, dtype=torch.int64), "matrix"),
    ],
)
def test_bad_calibration_is_refused(calibration, message):
    with pytest.raises(ValueError, match=message):
        prune_(tiny_model("llama"), calibration)


def test_a_pruned_model_is_not_pruned_again():
    model = tiny_model("llama")
    prune_(model, random_tokens(), PruneConfig(**QUICK))
    with pytest.raises(ValueError, match="pruned already"):
        prune_(model, random_tokens(), PruneConfig(**QUICK))


def test_no_block_fits_at_all():
    with pytest.raises(ValueError, match=r"no layer can be pruned .*block 7 does not fit"):
        prune_(tiny_model("llama"), random_tokens(), PruneConfig(block=7))


def test_a_dense_folder_is_not_loaded_as_pruned(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    with pytest.raises(NotPruned, match="armorfact prune"):
        load_pruned(tmp_path)
    with pytest.raises(NotPruned, match=r"no config\.json"):
        load_pruned(tmp_path / "nowhere")


def test_one_token_without_shrinkage_never_ends_above_sparsegpt():
    """A Gram matrix of rank one: rounding makes it indefinite, which minimizing would find out."""
    report = prune_(tiny_model("llama"), random_tokens(1, 1), PruneConfig(shrinkage=0.0))
    for layer in report.layers:
        assert 0 <= layer.losses["armorfact"] <= layer.losses["sparsegpt"] + 1e-12
