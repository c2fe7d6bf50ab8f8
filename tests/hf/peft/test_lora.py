"""PEFT's LoRA on pruned layers, with the real PEFT and the real Trainer."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from packaging.version import Version
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from transformers.integrations.peft import MIN_PEFT_VERSION
from transformers.trainer_utils import set_seed

from armorfact_hf import PruneConfig, load_pruned, prune_, save_pruned
from armorfact_hf.checkpoint import registration
from armorfact_hf.layers.linear import FactorizedLinear
from tests.hf.models import random_tokens, tiny_model

pytestmark = [
    pytest.mark.usefixtures("offline"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # PEFT asks for it
]
peft = pytest.importorskip("peft", reason="needs 'armorfact[peft]'")

FAST = PruneConfig(sweeps=1, baselines=(), block=8, refine=None)
TOKENS = random_tokens(8, 24, seed=3)
SAME = [{"input_ids": row, "labels": row} for row in TOKENS]


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A pruned Llama."""
    folder = tmp_path_factory.mktemp("lora") / "pruned"
    model = tiny_model("llama", initializer_range=0.1)
    prune_(model, random_tokens(), FAST)
    save_pruned(model, folder)
    return folder


def lora(**changes):
    return peft.LoraConfig(**{"r": 4, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"} | changes)


def logits(model):
    with torch.no_grad():
        return model.eval()(TOKENS).logits


def trained(model, out, steps=20, rate=3e-2):
    """The trainer's mean loss before and after."""
    set_seed(0)
    arguments = TrainingArguments(
        str(out), max_steps=steps, learning_rate=rate, per_device_train_batch_size=8, use_cpu=True, logging_steps=1,
        report_to="none", save_strategy="no", disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=SAME)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses[0], losses[-1]


def test_twenty_steps_lower_the_loss_and_the_saved_adapter_gives_equal_logits(folder, tmp_path):
    base = load_pruned(folder)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = peft.get_peft_model(base, lora(target_modules="all-linear"))
    first, last = trained(model, tmp_path)
    assert last < 0.8 * first
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(load_pruned(folder), tmp_path / "adapter")
    assert torch.equal(logits(again), logits(model))
    base = model.unload()
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())


@pytest.mark.skipif(Version(peft.__version__) < Version(MIN_PEFT_VERSION), reason="transformers asks for a newer PEFT")
def test_transformers_own_door_takes_and_trains_it(folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.add_adapter(lora(target_modules="all-linear"))
    first, last = trained(model, tmp_path)
    assert last < 0.8 * first
    model.save_pretrained(tmp_path / "adapter")
    again = AutoModelForCausalLM.from_pretrained(folder)
    again.load_adapter(str(tmp_path / "adapter"))
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize(
    ("family", "changes"),
    [("llama", {}), ("gpt2", {"use_dora": True}), ("gpt2", {"lora_bias": True, "use_rslora": True})],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:.*lora_bias=True")
def test_it_computes_what_it_computes_on_dense_weights(family, changes):
    names = {"llama": ["q_proj", "down_proj"], "gpt2": ["c_attn", "mlp.c_proj"]}[family]
    changes = changes | {"target_modules": names, "fan_in_fan_out": family == "gpt2", "init_lora_weights": False}
    found = []
    for densify in (False, True):
        model = tiny_model(family, initializer_range=0.1)
        prune_(model, random_tokens(), FAST)
        model = model.dequantize() if densify else model
        set_seed(1)
        model = peft.get_peft_model(model, lora(**changes))
        loss = model(TOKENS, labels=TOKENS).loss
        loss.backward()
        gradients = [p.grad for name, p in model.named_parameters() if "lora_" in name]
        found.append((loss, *gradients))
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-5)


def test_all_linear_means_pruned_layers_too(folder):
    model = load_pruned(folder)
    pruned = sum(isinstance(module, FactorizedLinear) for module in model.modules())
    model = peft.get_peft_model(model, lora(target_modules="ALL-linear"))
    model.add_adapter("second", lora(target_modules="all-linear"))
    tuned = [module for module in model.modules() if isinstance(module, peft.tuners.lora.LoraLayer)]
    assert len(tuned) == pruned and all({"default", "second"} == set(layer.lora_A) for layer in tuned)


@pytest.mark.parametrize("merge", ["merge_and_unload", "merge_adapter"])
def test_merging_is_refused_with_a_way_out_and_changes_nothing(folder, merge):
    model = peft.get_peft_model(load_pruned(folder), lora(init_lora_weights=False))
    before = logits(model)
    told = (
        r"cannot merge the adapter default into a pruned layer \(32x32, 2:4\): the sum is neither sparse nor .* export"
    )
    with pytest.raises(ValueError, match=told):
        getattr(model, merge)()
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("merge", ["merge_and_unload", "merge_adapter"])
def test_dense_layers_before_the_first_pruned_one_are_not_merged_either(merge):
    model = tiny_model("llama", initializer_range=0.1)
    prune_(model, random_tokens(), replace(FAST, include=("down_proj",)))
    model = peft.get_peft_model(model, lora(init_lora_weights=False))
    before, tensors = logits(model), {name: x.clone() for name, x in model.state_dict().items()}
    with pytest.raises(ValueError, match="cannot merge the adapter default into a pruned layer"):
        getattr(model, merge)()
    assert torch.equal(logits(model), before) and model.state_dict().keys() == tensors.keys()
    assert all(torch.equal(x, tensors[name]) for name, x in model.state_dict().items())
    model.unload()


@pytest.mark.parametrize("start", ["pissa", "olora", "pissa_niter_4"])
def test_a_start_that_changes_the_weight_is_refused(folder, start):
    with pytest.raises(ValueError, match=f"q_proj is pruned: init_lora_weights='{start}' may change the weight"):
        peft.get_peft_model(load_pruned(folder), lora(init_lora_weights=start))


def test_a_variant_that_is_not_tested_is_refused(folder):
    with pytest.raises(ValueError, match="q_proj is pruned: alora_invocation_tokens is not supported there"):
        peft.get_peft_model(load_pruned(folder), lora(alora_invocation_tokens=[3]))


@pytest.mark.skipif(
    "target_parameters" not in {field.name for field in fields(peft.LoraConfig)}, reason="this PEFT does not know them"
)
def test_parameters_as_targets_are_refused(folder):
    with pytest.raises(ValueError, match=r"target_parameters=.* is not supported there"):
        peft.get_peft_model(load_pruned(folder), lora(target_modules=[], target_parameters=["mlp.down_proj.values"]))


def test_other_kinds_of_adapters_are_refused_by_peft(folder):
    chosen = {"target_modules": ["q_proj"]}
    for config in (peft.LoHaConfig(**chosen), peft.IA3Config(**chosen, feedforward_modules=[])):
        with pytest.raises((TypeError, ValueError), match=r"FactorizedLinear.* (is )?not supported"):
            peft.get_peft_model(load_pruned(folder), config)


def test_a_wrapped_model_is_not_made_dense(folder):
    model = peft.get_peft_model(load_pruned(folder), lora()).get_base_model()
    with pytest.raises(ValueError, match=r"q_proj\.base_layer is inside of an adapter: take it out first"):
        model.dequantize()


def test_a_model_without_adapters_is_refused_by_the_trainer(folder, tmp_path):
    with pytest.raises(ValueError, match="Please attach trainable adapters"):
        trained(load_pruned(folder), tmp_path)


def test_dense_models_go_the_way_of_peft():
    config = lora(target_modules="all-linear")
    peft.get_peft_model(tiny_model("llama"), config)
    assert config._custom_modules is None


def test_it_registers_where_peft_was_imported_before(monkeypatch):
    registered = []
    monkeypatch.setattr(registration, "import_module", registered.append)
    registration.register()
    assert registered == ["armorfact_hf.checkpoint.quantizer", "armorfact_hf.peft.injection"]
