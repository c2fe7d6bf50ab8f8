"""The stored factors in transformers' own Trainer: they learn, and the pattern holds exactly."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from transformers.trainer_utils import set_seed

from armorfact_hf import Execution, PruneConfig, load_pruned, prune_, save_pruned, train_factors_, verify_folder
from armorfact_hf.checkpoint.folder import describe_folder
from armorfact_hf.layers.linear import FactorizedLinear
from tests.hf.models import random_tokens, tiny_model

TOKENS = random_tokens(8, 24, seed=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("factors") / "pruned"
    model = tiny_model("qwen2", initializer_range=0.1)
    prune_(model, random_tokens(), PruneConfig(sweeps=1, baselines=(), block=8, refine=None))
    save_pruned(model, folder)
    return folder


def layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, FactorizedLinear)}


def train(model, out):
    set_seed(0)
    arguments = TrainingArguments(
        str(out), max_steps=20, learning_rate=1e-2, per_device_train_batch_size=8, use_cpu=True, logging_steps=1,
        report_to="none", save_strategy="no", disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=[{"input_ids": row, "labels": row} for row in TOKENS])
    trainer.train()
    trainer.save_model(str(out / "trained"))
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses[0], losses[-1]


def test_twenty_steps_lower_the_loss_and_the_pattern_holds(folder, tmp_path):
    model = train_factors_(load_pruned(folder))
    before = {name: layer.positions.clone() for name, layer in layers(model).items()}
    values = {name: layer.values.detach().clone() for name, layer in layers(model).items()}
    dense = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    first, last = train(model, tmp_path)
    assert last < 0.8 * first
    for name, layer in layers(model).items():
        assert torch.equal(layer.positions, before[name]) and not torch.equal(layer.values, values[name])
        assert (layer.core.dense().unflatten(1, (-1, 4)).count_nonzero(-1) <= 2).all()
    assert all(torch.equal(model.get_parameter(name), tensor) for name, tensor in dense.items())
    saved = tmp_path / "trained"
    assert verify_folder(saved, describe_folder(saved)).digests
    with torch.no_grad():
        again, kept = AutoModelForCausalLM.from_pretrained(saved)(TOKENS).logits, model.eval()(TOKENS).logits
    assert torch.equal(again, kept)


def test_wrappers_alone(folder):
    model = train_factors_(load_pruned(folder), train="wrappers")
    open_ = {name.rpartition(".")[2] for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert open_ == {"left", "right"}


def test_no_copy_of_a_weight_is_left_behind(folder):
    model = load_pruned(folder)
    for layer in layers(model).values():
        layer.use_(Execution.always("dense"))
    train_factors_(model)
    assert all(layer.execution is None and layer.merged is None for layer in layers(model).values())


def test_what_cannot_be_trained_is_told(folder):
    with pytest.raises(ValueError, match="train must be one of factors, wrappers, got 'norms'"):
        train_factors_(load_pruned(folder), train="norms")
    with pytest.raises(ValueError, match="the model has no pruned layers to train"):
        train_factors_(tiny_model("llama"))
    core_only = tiny_model("llama")
    prune_(core_only, random_tokens(), PruneConfig(method="wanda", baselines=()))
    with pytest.raises(ValueError, match="the model has no wrappers to train"):
        train_factors_(core_only, train="wrappers")


def test_a_model_of_layers_made_by_hand(folder):
    model = tiny_model("llama")
    model.model.layers[0].mlp.up_proj = next(iter(layers(load_pruned(folder)).values()))
    assert train_factors_(model) is model and len(layers(model)) == 1
