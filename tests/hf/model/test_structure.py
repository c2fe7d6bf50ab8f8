"""Decoder blocks and their linear layers are found in every family; names choose among them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from armorfact_hf.model.structure import chosen_layers, decoder_blocks, matches
from armorfact_hf.pruning.config import PruneConfig
from armorfact_hf.pruning.prune import prune_
from tests.hf.models import BLOCKS, FAMILIES, INNER, WIDTH, random_tokens, tiny_model

LINEARS = {"phi": 6, "opt": 6, "gpt2": 4, "falcon": 4}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_layer_of_every_block_is_found(family):
    model = tiny_model(family)
    prefix, blocks = decoder_blocks(model)
    layers, dense = chosen_layers(model)
    assert len(blocks) == BLOCKS
    assert len(layers) == BLOCKS * LINEARS.get(family, 7)
    assert dense == []
    assert all(layer.name.startswith(f"{prefix}.{layer.decoder_block}.") for layer in layers)
    assert all(model.get_submodule(layer.name) is layer.module for layer in layers)


def test_a_conv1d_shows_its_weight_as_out_by_in():
    layers, _ = chosen_layers(tiny_model("gpt2"), include=("c_fc",))
    assert layers[0].shape == (4 * WIDTH, WIDTH)
    x = torch.randn(3, WIDTH)
    torch.testing.assert_close(layers[0].module(x), x @ layers[0].weight.T + layers[0].module.bias)


@pytest.mark.parametrize(
    ("expression", "name", "expected"),
    [
        ("q_proj", "model.layers.0.self_attn.q_proj", True),
        ("self_attn.q_proj", "model.layers.0.self_attn.q_proj", True),
        ("proj", "model.layers.0.self_attn.q_proj", False),
        ("re:.*mlp.*", "model.layers.0.mlp.up_proj", True),
        ("re:mlp", "model.layers.0.mlp.up_proj", False),
        ("re:model.layers.1\\.", "model.layers.11.mlp.up_proj", False),
    ],
)
def test_expressions(expression, name, expected):
    assert matches(expression, name) == expected


def test_include_ignore_and_select_narrow_down():
    model = tiny_model("llama")
    layers, dense = chosen_layers(
        model, ("re:.*mlp.*",), ("down_proj",), select=lambda name, module: "layers.0" not in name
    )
    assert [layer.name.rpartition(".")[2] for layer in layers] == ["gate_proj", "up_proj"] * 2
    reasons = {layer.name: layer.reason for layer in dense}
    assert reasons["model.layers.1.self_attn.q_proj"] == "not included"
    assert reasons["model.layers.1.mlp.down_proj"] == "ignored by 'down_proj'"
    assert reasons["model.layers.0.mlp.up_proj"] == "not selected"
    assert len(layers) + len(dense) == 7 * BLOCKS


@pytest.mark.parametrize("tied", ["module", "weight", "in one block"])
def test_a_weight_with_several_places_stays_dense(tied):
    model = tiny_model("llama")
    first, last = model.model.layers[0].mlp, model.model.layers[-1].mlp
    if tied == "module":
        model.model.layers[-1].mlp = first
    elif tied == "weight":
        last.up_proj.weight = first.up_proj.weight
    else:
        first.gate_proj = first.up_proj
    names = {
        "module": [f"{n}.mlp.{each}" for n in (0, BLOCKS - 1) for each in ("gate_proj", "up_proj", "down_proj")],
        "weight": [f"{n}.mlp.up_proj" for n in (0, BLOCKS - 1)],
        "in one block": ["0.mlp.gate_proj", "0.mlp.up_proj"],
    }[tied]
    layers, dense = chosen_layers(model)
    assert sorted(each.name for each in dense) == sorted(f"model.layers.{name}" for name in names)
    assert all("its weight has 2 places, model.layers.0.mlp." in each.reason for each in dense)
    assert len(layers) == 7 * BLOCKS - len(names)
    report = prune_(model, random_tokens(4), PruneConfig(sweeps=1, tail=1))
    assert report.dense_layers == tuple(dense)
    assert not any(module.training for module in model.modules())


def test_the_head_is_pruned_when_asked_for():
    layers, _ = chosen_layers(tiny_model("llama"), head=True)
    assert (layers[-1].name, layers[-1].decoder_block) == ("lm_head", None)


@pytest.mark.parametrize("where", [{"include": ("q_prj",)}, {"ignore": ("re:nothing",)}])
def test_an_expression_that_matches_nothing_lists_the_names(where):
    with pytest.raises(ValueError, match=r"matches no linear layer .*down_proj, gate_proj, k_proj"):
        chosen_layers(tiny_model("llama"), **where)


def test_nothing_left_to_prune_is_told():
    with pytest.raises(ValueError, match=r"leave no linear layer.*: model\.layers\.0\..*: ignored by 're:\.\*'"):
        chosen_layers(tiny_model("llama"), ignore=("re:.*",))
    model = tiny_model("llama")
    model.model.layers = nn.ModuleList([model.model.layers[0]] * 3)
    with pytest.raises(ValueError, match="its weight has 3 places"):
        chosen_layers(model)


def test_a_model_without_blocks_is_told():
    with pytest.raises(ValueError, match="expected a decoder-only"):
        decoder_blocks(nn.Sequential(nn.Linear(2, 2)))


def test_the_list_of_blocks_wins_against_a_list_of_experts_in_its_only_block():
    block = nn.Module()
    block.experts = nn.ModuleList([nn.Linear(INNER, INNER) for _ in range(4)])
    model = nn.Module()
    model.layers = nn.ModuleList([block])
    assert decoder_blocks(model)[0] == "layers"


class Scaled(nn.Linear):
    """More than it seems."""

    def forward(self, x):
        return 1.05 * super().forward(x)


class Renamed(nn.Linear):
    """As Falcon's: a forward of its own, that computes what `nn.Linear` does."""

    def forward(self, x):
        return x @ self.weight.T + self.bias


def unlike(kind: str, dtype: torch.dtype) -> nn.Module:
    layer = {"scaled": Scaled, "renamed": Renamed}.get(kind, nn.Linear)(64, 64, dtype=dtype)
    if kind == "hook":
        layer.register_forward_hook(lambda module, args, output: 2 * output)
    if kind == "early hook":
        layer.register_forward_pre_hook(lambda module, args: (2 * args[0],))
    if kind == "forward":
        layer.forward = lambda x: 2 * x
    if kind == "parametrized":
        nn.utils.parametrizations.weight_norm(layer)
    return layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("scaled", "a Scaled with a forward of its own"),
        ("hook", "it has forward hooks"),
        ("early hook", "it has forward hooks"),
        ("forward", "a Linear with a forward of its own"),
        ("parametrized", "its weight is parametrized"),
        ("renamed", ""),
        ("plain", ""),
    ],
)
def test_a_layer_that_computes_more_than_a_product_stays_dense(kind, reason, dtype):
    model = tiny_model("llama")
    model.model.layers[1].mlp.up_proj = unlike(kind, dtype)
    layers, dense = chosen_layers(model)
    reasons = {layer.name: layer.reason for layer in dense}
    assert reasons.get("model.layers.1.mlp.up_proj", "").startswith(reason)
    assert ("model.layers.1.mlp.up_proj" in reasons) == bool(reason) == (len(layers) == 7 * BLOCKS - 1)


def test_a_head_that_computes_more_than_a_product_is_refused():
    model = tiny_model("llama", tie_word_embeddings=False)
    model.lm_head.register_forward_hook(lambda module, args, output: 2 * output)
    with pytest.raises(ValueError, match="the head cannot be pruned: it has forward hooks"):
        chosen_layers(model, head=True)
