"""Experts that are pruned: saved, verified, loaded and made dense again."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from armorfact_hf.checkpoint.dense import to_dense_
from armorfact_hf.checkpoint.description import Description
from armorfact_hf.checkpoint.folder import describe_folder, load_pruned, save_pruned
from armorfact_hf.checkpoint.quantizer import put_experts_
from armorfact_hf.checkpoint.verify import verify_folder
from armorfact_hf.layers.experts import FactorizedExperts
from armorfact_hf.pruning.config import PruneConfig
from armorfact_hf.pruning.prune import prune_
from armorfact_hf.runs.inspect import inspect_folder
from armorfact_hf.vllm.files import stored_names
from tests.hf.checkpoint.cases import config, entry
from tests.hf.models import EXPERTS, random_tokens, tiny_model

CONFIG = PruneConfig(sweeps=1, refine=None, baselines=())


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A pruned model of each family and the folder that it was saved to."""
    made: dict[str, tuple] = {}

    def make(family: str):
        if family not in made:
            model, folder = tiny_model(family, dtype=torch.bfloat16), tmp_path_factory.mktemp(family)
            report = prune_(model, random_tokens(), CONFIG)
            save_pruned(model, folder)
            made[family] = (model, folder, report)
        return made[family]

    return make


@pytest.mark.parametrize("family", EXPERTS)
@torch.no_grad()
def test_a_saved_model_computes_the_same(written, family):
    model, folder, _ = written(family)
    tokens = random_tokens(seed=1)
    loaded = load_pruned(folder)
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    first, second = (x.generate(tokens[:1], max_new_tokens=8, do_sample=False) for x in (model, loaded))
    assert torch.equal(first, second)
    again = folder / "again"
    save_pruned(loaded, again)
    assert (again / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize("family", EXPERTS)
@torch.no_grad()
def test_int8_cores_of_experts_load_to_the_same_logits(family, tmp_path):
    model, tokens = tiny_model(family, dtype=torch.bfloat16), random_tokens(seed=1)
    report = prune_(model, random_tokens(), replace(CONFIG, core_dtype="int8"))
    for layer in report.layers:
        assert layer.losses["armorfact"] < 1.1 * layer.unrounded_loss + 1e-3
    stacks = [stack for x in model.modules() if isinstance(x, FactorizedExperts) for stack in x.stacks.values()]
    assert stacks and {(stack.values.dtype, stack.dtype) for stack in stacks} == {(torch.int8, torch.bfloat16)}
    save_pruned(model, tmp_path)
    description = describe_folder(tmp_path)
    assert description.version == 4 and {layer.core_dtype for layer in description.modules.values()} == {"int8"}
    verify_folder(tmp_path, description)
    loaded = load_pruned(tmp_path)
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    for layer in inspect_folder(tmp_path):
        assert sum(layer.theory) == pytest.approx(layer.bytes)
    logits = to_dense_(loaded)(tokens).logits
    assert (logits - model(tokens).logits).norm() < 0.05 * logits.norm()


@pytest.mark.parametrize("family", EXPERTS)
def test_tensors_are_stored_under_the_names_that_they_have_in_the_model(written, family):
    """transformers renames, splits and merges what stands under its own names of experts' weights."""
    model, folder, report = written(family)
    stored, held = load_file(folder / "model.safetensors"), model.state_dict()
    assert set(stored) == set(held) and all(torch.equal(stored[name], held[name]) for name in held)
    description = describe_folder(folder)
    assert description.version == 2 and json.loads((folder / "config.json").read_text())["quantization_config"][
        "version"
    ] == 2  # fmt: skip
    verify_folder(folder, description)
    assert {name for layer in description.modules.values() for name in layer.members} == {
        layer.name for layer in report.layers
    }


@pytest.mark.parametrize("family", EXPERTS)
def test_cores_keep_two_of_four(written, family):
    model, _, _ = written(family)
    experts = [module for module in model.modules() if isinstance(module, FactorizedExperts)]
    assert experts
    for stack in (stack for module in experts for stack in module.stacks.values()):
        for factors, _ in stack.each:
            groups = (factors.core.dense() != 0).unflatten(-1, (-1, 4)).sum(-1)
            assert groups.max() <= 2


@torch.no_grad()
def test_made_dense_again(written):
    _, folder, _ = written("gpt_oss")
    model, tokens = load_pruned(folder, dtype=torch.float32), random_tokens(seed=2)
    expected = model(tokens).logits
    dense = to_dense_(model)
    assert not any(isinstance(module, FactorizedExperts) for module in dense.modules())
    assert torch.allclose(dense(tokens).logits, expected, atol=1e-4)


@pytest.mark.parametrize("family", EXPERTS)
@torch.no_grad()
def test_from_a_dense_folder_to_a_pruned_one_and_back(tmp_path, family):
    """A dense checkpoint has other names than the model, which a pruned one has not."""
    tiny_model(family).save_pretrained(tmp_path / "dense")
    names = set(load_file(tmp_path / "dense" / "model.safetensors"))
    model, tokens = AutoModelForCausalLM.from_pretrained(tmp_path / "dense"), random_tokens(seed=3)
    prune_(model, random_tokens(), PruneConfig(method="magnitude", baselines=()))
    save_pruned(model, tmp_path / "pruned")
    loaded = load_pruned(tmp_path / "pruned")
    expected = model(tokens).logits
    assert torch.equal(loaded(tokens).logits, expected)
    to_dense_(loaded).save_pretrained(tmp_path / "again")
    assert set(load_file(tmp_path / "again" / "model.safetensors")) == names
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.allclose(again(tokens).logits, expected, atol=1e-4)


def test_inspect_counts_every_expert(written):
    _, folder, report = written("qwen3_moe")
    held = inspect_folder(folder)
    assert sum(layer.bytes for layer in held) == sum(layer.bytes for layer in report.layers)
    assert sum(layer.dense_bytes for layer in held) == sum(layer.dense_bytes for layer in report.layers)
    assert {layer.experts for layer in held} == {None, 4}


def test_vllm_is_told_which_layer(written):
    _, folder, _ = written("mixtral")
    with pytest.raises(ValueError, match=r"^model\.layers\.0\.mlp\.experts\.gate holds pruned experts, and vLLM"):
        stored_names(str(folder), None, whole=False)


@pytest.mark.parametrize(
    ("part", "damage", "told"),
    [
        ("gate.values", lambda x: x.index_fill(0, torch.tensor([3]), torch.nan), "NaN or infinite"),
        ("down.positions", lambda x: x.index_fill(0, torch.tensor([2]), 0), r"a position occurs twice"),
        ("up.left", lambda x: x + 1, "sha256 differs"),
        ("up.right", lambda x: x[:2].contiguous(), r"has shape \[2, .*expected \[4"),
        ("up.values", lambda x: x[..., :4].contiguous(), "holds fewer than 2 values in a group of 4"),
    ],
)
def test_damage_is_named(written, tmp_path, part, damage, told):
    _, folder, _ = written("mixtral")
    name = f"model.layers.1.mlp.experts.{part}"
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = damage(tensors[name])
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    found = json.loads((folder / "config.json").read_text())
    if told != "sha256 differs":
        del found["quantization_config"]["sha256"]
    (tmp_path / "config.json").write_text(json.dumps(found))
    with pytest.raises(ValueError, match=re.escape(name) + ".*" + told):
        verify_folder(tmp_path, describe_folder(tmp_path))
    with pytest.raises(ValueError, match=re.escape(name)):
        load_pruned(tmp_path)


@pytest.mark.parametrize(
    ("owner", "projection", "experts", "told"),
    [
        ("mlp.experts", "gates", 4, "lists gates, up, down of .*, expected gate, up, down"),
        ("mlp.expert", "gate", 4, "the model has no such experts"),
        ("mlp", "gate", 4, "the model has no such experts"),
        ("mlp.experts", "gate", 5, r"gives .*gate the shape \[5, 64, 32\].* it has \[4, 64, 32\]"),
    ],
)
def test_experts_that_the_model_lacks(written, owner, projection, experts, told):
    _, folder, _ = written("mixtral")
    gate, up, down = [layer for layer in describe_folder(folder).modules.values() if layer.experts][:3]
    layers = {projection: replace(gate, experts=experts), "up": up, "down": down}
    with pytest.raises(ValueError, match=f"config.json {told}" if "gives" in told else told):
        put_experts_(tiny_model("mixtral"), f"model.layers.0.{owner}", layers)


def test_version_1_has_no_word_for_experts():
    found = config(modules=[entry(experts=4)])
    with pytest.raises(ValueError, match=r"expected only the keys name, shape, block, got \['experts'\]"):
        Description.from_dict(found, "here")
    assert Description.from_dict(found | {"version": 2}, "here").to_dict()["version"] == 2


@pytest.mark.parametrize("experts", [0, -1, True, "4", 4.0, None])
def test_a_number_of_experts_that_is_none(experts):
    with pytest.raises(ValueError, match="experts to be"):
        Description.from_dict(config(version=2, modules=[entry(experts=experts)]), "here")
