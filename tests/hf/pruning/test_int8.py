"""Whole models with int8 cores: rounded after all tuning, stored as they are reported, resumed to the same bits."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open

from armorfact_hf.checkpoint.dense import to_dense_
from armorfact_hf.checkpoint.fingerprint import model_fingerprint
from armorfact_hf.checkpoint.folder import describe_folder, load_pruned
from armorfact_hf.layers.linear import FactorizedLinear
from armorfact_hf.pruning.config import PruneConfig
from armorfact_hf.pruning.job import make_job
from armorfact_hf.pruning.plan import make_plan
from armorfact_hf.pruning.prune import prune_
from armorfact_hf.pruning.resume.journal import Journal
from armorfact_hf.pruning.schedule import kept_aside
from armorfact_hf.recovery.recover import recover_
from armorfact_hf.recovery.settings import RecoverySettings
from armorfact_hf.recovery.trainable import train_factors_
from armorfact_hf.runs.inspect import inspect_folder
from armorfact_hf.runs.save import save_pruned
from tests.hf.models import BLOCKS, random_tokens, tiny_model
from tests.hf.observers import Stepping
from tests.hf.settings import layers_alone

INT8 = PruneConfig(core_dtype="int8", sweeps=2, passes=1, tail=2, baselines=())
WHOLE = replace(INT8, wrapper_dtype="int8")
SETTINGS = {
    "layers alone": layers_alone(INT8),
    "the paper's objective": layers_alone(INT8, objective="nowag"),
    "blocks and tail": INT8,
    "with the head": layers_alone(INT8, head=True),
    "wrappers as well": WHOLE,
    "wrappers as well, layers alone": layers_alone(WHOLE),
}


def layers_of(model) -> dict[str, FactorizedLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, FactorizedLinear)}


@torch.no_grad()
def behind_the_first_block(model, tokens):
    return model(tokens, output_hidden_states=True).hidden_states[1]


def pruned(config=INT8, dtype=torch.bfloat16, windows=4, **more):
    model = tiny_model("llama", dtype=dtype)
    return model, prune_(model, random_tokens(windows), config, **more)


@pytest.mark.parametrize("settings", SETTINGS)
def test_every_core_is_int8_and_the_report_is_of_what_is_stored(settings):
    model, report = pruned(SETTINGS[settings])
    layers = layers_of(model)
    assert set(layers) == {layer.name for layer in report.layers}
    assert {layer.values.dtype for layer in layers.values()} == {torch.int8}
    assert {layer.dtype for layer in layers.values()} == {torch.bfloat16}
    assert {layer.layout.wrapper_dtype for layer in layers.values()} == {SETTINGS[settings].wrapper_dtype}
    for layer in report.layers:
        assert layer.bytes == layers[layer.name].nbytes
        assert layer.unrounded_loss is not None
        assert layer.losses["armorfact"] < 1.1 * layer.unrounded_loss + 1e-3
        assert "; in int8 " in layer.status


@pytest.mark.parametrize("config", [INT8, WHOLE], ids=["core", "wrappers as well"])
def test_rounding_costs_hardly_anything_beside_the_same_run_without(config):
    model, report = pruned(layers_alone(config), torch.float32)
    plain, before = pruned(layers_alone(INT8, core_dtype=None), torch.float32)
    first, other = report.layers[0], before.layers[0]
    assert first.unrounded_loss == pytest.approx(other.losses["armorfact"])
    assert first.losses["armorfact"] < 1.01 * first.unrounded_loss  # of two sweeps, so that A and B have much to gain
    tokens = random_tokens(2)
    dense = tiny_model("llama")(tokens).logits
    assert (model(tokens).logits - dense).norm() < 1.02 * (plain(tokens).logits - dense).norm()


def test_tuned_layers_stay_what_tuning_made_of_them():
    """Rounded towards W, they would be as far from the tuned product as before the tuning."""
    config = replace(INT8, tail=0, passes=3, include=("re:model.layers.0.*",))
    model, report = pruned(config, torch.float32, 9)
    plain, _ = pruned(replace(config, core_dtype=None), torch.float32, 9)
    factorized, _ = pruned(layers_alone(config, core_dtype=None), torch.float32, 9)
    assert [block.kept for block in report.blocks] == [True]
    for layer in report.layers:
        rounded, tuned, before = (layers_of(x)[layer.name].weight for x in (model, plain, factorized))
        assert (rounded - tuned).norm() < 0.2 * (before - tuned).norm()


def test_blocks_of_the_tail_are_rounded_once_in_the_end(tmp_path):
    """The journal holds them as they are tuned, and what the tail makes of them in int8."""
    config = INT8
    job = make_job(tiny_model("llama", dtype=torch.bfloat16), random_tokens(), config)
    pruned(config, journal=tmp_path / "journal")
    with Journal.open(tmp_path / "journal", job.manifest, config.pattern) as journal:
        kinds = {key: {x.values.dtype for x, _ in journal.read(key).layers} for key in ("block-0000", "tail")}
        kinds["last"] = {x.values.dtype for x, _ in journal.read(f"block-{BLOCKS - 1:04}").layers}
    assert kinds == {"block-0000": {torch.int8}, "tail": {torch.int8}, "last": {torch.bfloat16}}


def test_the_error_of_a_block_in_int8_is_that_of_the_model_that_is_returned():
    config, tokens = replace(INT8, tail=0, include=("re:model.layers.0.*",)), random_tokens()
    model, report = pruned(config, torch.float32)
    [block] = report.blocks
    target, output = (behind_the_first_block(one, tokens) for one in (tiny_model("llama"), model))
    weights = 1 / target.square().mean((0, 1))
    errors = ((output - target).square() * weights).sum(-1) / (target.square() * weights).sum(-1)
    assert block.rounded == pytest.approx(float(errors[list(kept_aside(len(tokens)))].mean()), rel=1e-4)
    assert block.rounded != block.after
    assert pruned(replace(config, core_dtype=None), torch.float32)[1].blocks[0].rounded is None


def test_the_divergence_of_the_tail_in_int8_is_that_of_the_model_that_is_returned():
    tokens = random_tokens()
    model, report = pruned(INT8, torch.float32)
    *blocks, tail = report.blocks
    aside = tokens[list(kept_aside(len(tokens)))]
    with torch.no_grad():
        dense, logits = (one(aside).logits.log_softmax(-1) for one in (tiny_model("llama"), model))
    assert tail.rounded == pytest.approx(float((dense.exp() * (dense - logits)).sum(-1).mean()), rel=1e-3)
    assert [block.rounded is not None for block in blocks] == [block.decoder_block < BLOCKS - 2 for block in blocks]


def test_a_folder_in_version_4_is_resumed_loaded_inspected_and_not_trained(tmp_path):
    model, report = pruned(WHOLE, journal=tmp_path / "journal")
    again, _ = pruned(WHOLE, journal=tmp_path / "journal")
    assert model_fingerprint(again) == model_fingerprint(model)
    save_pruned(model, tmp_path / "pruned")
    found = json.loads((tmp_path / "pruned" / "config.json").read_text())["quantization_config"]
    assert (found["version"], {entry["wrapper_dtype"] for entry in found["modules"]}) == (4, {"int8"})
    loaded, tokens = load_pruned(tmp_path / "pruned"), random_tokens(2)
    assert model_fingerprint(loaded) == model_fingerprint(model)
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    for layer, told in zip(inspect_folder(tmp_path / "pruned"), report.layers, strict=True):
        assert (layer.core_dtype, layer.wrapper_dtype, layer.bytes) == ("int8", "int8", told.bytes)
        assert sum(layer.theory) == pytest.approx(layer.bytes)
    for train in ("factors", "wrappers"):
        with pytest.raises(ValueError, match=r"wrappers of .*q_proj are int8, .* pruned without --wrapper-dtype"):
            train_factors_(loaded, train)
    assert not layers_of(to_dense_(loaded))


@pytest.mark.parametrize(
    "stop", [f"decoder block 2 of {BLOCKS}, window 1", "the last decoder blocks, tuned as a whole"]
)
def test_a_run_that_was_stopped_ends_with_the_same_bits(stop, tmp_path):
    whole, _ = pruned()

    def act(step):
        if step.doing == stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pruned(journal=tmp_path / "journal", observer=Stepping(act))
    resumed, _ = pruned(journal=tmp_path / "journal")
    assert model_fingerprint(resumed) == model_fingerprint(whole)
    again, _ = pruned(journal=tmp_path / "journal")
    assert model_fingerprint(again) == model_fingerprint(whole)


def test_a_folder_in_version_3_loads_to_the_same_logits_and_is_inspected(tmp_path):
    model, report = pruned()
    save_pruned(model, tmp_path / "pruned")
    found = json.loads((tmp_path / "pruned" / "config.json").read_text())["quantization_config"]
    assert found["version"] == 3
    assert {entry["core_dtype"] for entry in found["modules"]} == {"int8"}
    assert describe_folder(tmp_path / "pruned").to_dict() == found
    with safe_open(tmp_path / "pruned" / "model.safetensors", "pt") as stored:
        assert stored.get_slice(f"{report.layers[0].name}.values").get_dtype() == "I8"
    tokens = random_tokens(2)
    loaded = load_pruned(tmp_path / "pruned")
    assert model_fingerprint(loaded) == model_fingerprint(model)
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    wide = load_pruned(tmp_path / "pruned", dtype=torch.float32)
    assert {(x.values.dtype, x.dtype) for x in layers_of(wide).values()} == {(torch.int8, torch.float32)}
    held = inspect_folder(tmp_path / "pruned")
    for layer, told in zip(held, report.layers, strict=True):
        assert (layer.core_dtype, layer.bytes) == ("int8", told.bytes)
        assert sum(layer.theory) == pytest.approx(layer.bytes)
        assert layer.dense_bytes == told.dense_bytes


def test_it_becomes_dense_again():
    model, _ = pruned(dtype=torch.float32)
    tokens, logits = random_tokens(2), model(random_tokens(2)).logits
    dense = to_dense_(copy.deepcopy(model))
    assert not layers_of(dense)
    torch.testing.assert_close(dense(tokens).logits, logits, rtol=1e-3, atol=1e-3)


def test_the_plan_counts_a_byte_a_value():
    model = tiny_model("llama", dtype=torch.bfloat16)
    plan = make_plan(model, random_tokens(), INT8, measure=False)
    other = make_plan(model, random_tokens(), replace(INT8, core_dtype=None), measure=False)
    kept = sum(layer.shape[0] * layer.shape[1] // 2 for layer in plan.layers)
    assert other.bytes - plan.bytes == kept
    assert other.wrapper_overhead == plan.wrapper_overhead
    _, report = pruned()
    assert plan.bytes == sum(layer.bytes for layer in report.layers)
    whole = make_plan(model, random_tokens(), WHOLE, measure=False)
    assert whole.bytes == sum(layer.bytes for layer in pruned(WHOLE)[1].layers)
    assert plan.bytes - whole.bytes == round((plan.wrapper_overhead - whole.wrapper_overhead) * plan.dense_bytes)


def test_wrappers_can_be_trained_and_kept_values_are_refused_with_the_way_out():
    model, _ = pruned(dtype=torch.float32)
    teacher, tokens = tiny_model("llama"), random_tokens(9)
    for act in (lambda: recover_(model, tokens, teacher, RecoverySettings(steps=1)), lambda: train_factors_(model)):
        with pytest.raises(ValueError, match=r"q_proj is int8, which cannot be trained: take train='wrappers'"):
            act()
    before = {name: layer.values.clone() for name, layer in layers_of(model).items()}
    done = recover_(model, tokens, teacher, RecoverySettings(train="wrappers", steps=4, measure_every=2))
    assert done.after <= done.before
    assert all(torch.equal(layer.values, before[name]) for name, layer in layers_of(model).items())
    train_factors_(model, "wrappers")
    assert {name.rpartition(".")[2] for name, x in model.named_parameters() if x.requires_grad} == {"left", "right"}


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        ("llama", {"method": "wanda"}, "needs wrappers, which hold the scales"),
        ("llama", {"core_dtype": "int4"}, "core_dtype must be one of int8, None, got 'int4'"),
        ("mixtral", {"wrapper_dtype": "int8"}, r"experts, whose wrappers cannot be rounded to int8: leave them dense"),
        ("llama", {"core_dtype": None, "wrapper_dtype": "int8"}, "add core_dtype='int8'"),
        ("llama", {"wrapper_dtype": "int4"}, "wrapper_dtype must be one of int8, None, got 'int4'"),
    ],
)
def test_what_cannot_be_rounded_is_refused_before_any_work(family, settings, message):
    with pytest.raises(ValueError, match=message):
        prune_(tiny_model(family), random_tokens(), PruneConfig(**{"core_dtype": "int8", **settings}))


def test_experts_that_are_left_dense_do_not_keep_the_rest_from_being_rounded():
    model = tiny_model("mixtral")
    prune_(model, random_tokens(), layers_alone(WHOLE, ignore=("re:.*experts",)))
    assert {layer.values.dtype for layer in layers_of(model).values()} == {torch.int8}


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT asks for it
def test_a_trained_adapter_goes_around_an_int8_layer():
    peft = pytest.importorskip("peft")
    model, _ = pruned(dtype=torch.float32)
    for more in ({}, {"use_dora": True}):
        tuned = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(target_modules=["q_proj"], r=2, **more))
        loss = tuned(input_ids=random_tokens(2), labels=random_tokens(2)).loss
        loss.backward()
        assert any(
            x.grad is not None and bool(x.grad.any()) for name, x in tuned.named_parameters() if "lora_B" in name
        )
