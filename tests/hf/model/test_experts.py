"""Stacked experts as linear layers: what the views hold, how they are run, and which experts are left alone."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

from armorfact_hf.layers.experts import FactorizedExperts
from armorfact_hf.layers.routed import Gating, SeparateExperts
from armorfact_hf.model.dense_experts import dense_experts
from armorfact_hf.model.experts import StackedExperts, put_layers_, run_by_expert, stack_experts_
from armorfact_hf.model.moments import recorded_inputs
from armorfact_hf.model.structure import DenseLayer, chosen_layers
from tests.hf.checkpoint.cases import random_layer
from tests.hf.models import BLOCKS, COMMON, EXPERTS, GROUPED, INNER, TOKENS, WIDTH, random_tokens, tiny_model


def stacked_of(model) -> tuple[str, StackedExperts]:
    found = ((name, StackedExperts.of(module)) for name, module in model.named_modules())
    return next((name, stacked) for name, stacked in found if stacked is not None)


def call_of(stacked: StackedExperts, tokens: int = 9):
    """Arguments for an experts module; one of the four experts is given nothing."""
    generator = torch.Generator().manual_seed(1)
    chosen = torch.stack([torch.randperm(3, generator=generator)[:2] for _ in range(tokens)])
    weights = torch.rand(tokens, 2, generator=generator)
    return torch.randn(tokens, WIDTH, generator=generator), chosen, weights


@pytest.mark.parametrize("family", EXPERTS)
@torch.no_grad()
def test_the_views_compute_what_the_module_computes(family):
    model = tiny_model(family)
    for parameter in model.parameters():  # biases start at zero
        parameter.normal_(std=0.3)
    _, stacked = stacked_of(model)
    call = call_of(stacked)
    model.set_experts_implementation("eager")
    expected = stacked.module(*call)
    layers = {f"{e}.{name}": layer for e, held in enumerate(stacked.layers) for name, layer in held.items()}
    with run_by_expert(layers), recorded_inputs(layers) as inputs:
        found = stacked.module(*call)
    assert torch.allclose(found, expected, atol=1e-5)
    assert model.config._experts_implementation == "eager"
    rows = {name: tensor.shape for name, tensor in inputs.tensors.items()}  # by leader: gate stands for up
    assert {name.partition(".")[2] for name in rows} == {"gate", "down"}
    assert sum(shape[0] for name, shape in rows.items() if name.endswith("gate")) == 2 * len(call[0])
    assert not any(name.startswith("3.") for name in rows)


@pytest.mark.parametrize("family", EXPERTS)
@torch.no_grad()
def test_pruned_experts_apart_stacked_and_dense_compute_the_same(family):
    model = tiny_model(family, tie_word_embeddings=False)
    name, stacked = stacked_of(model)
    bias = stacked.module.has_bias
    layers = {
        f"{name}.{expert}.{projection}": random_layer(
            block=(4, 8), bias=bias, shape=tuple(stacked.weight(expert, projection).shape), seed=7 * expert
        )
        for expert in range(stacked.count)
        for projection in stacked.projections
    }
    call = call_of(stacked)
    put_layers_(model, layers)
    apart = model.get_submodule(name)
    assert isinstance(apart, SeparateExperts)
    expected = apart(*call)
    stack_experts_(model)
    pruned = model.get_submodule(name)
    assert isinstance(pruned, FactorizedExperts)
    assert torch.equal(pruned(*call), expected)
    assert torch.equal(pruned.separate()(*call), expected)
    dense = dense_experts(pruned)
    assert torch.allclose(dense(*call), expected, atol=1e-4 * expected.abs().max())


def test_gradients_pass_through_stacked_experts():
    model = tiny_model("gpt_oss")
    name, stacked = stacked_of(model)
    layers = {
        f"{name}.{e}.{p}": random_layer(bias=True, block=(4, 8), shape=tuple(stacked.weight(e, p).shape), seed=e)
        for e in range(4)
        for p in stacked.projections
    }
    x, chosen, weights = call_of(stacked)
    put_layers_(model, layers)
    apart = model.get_submodule(name).requires_grad_()
    pruned = FactorizedExperts.of(apart).requires_grad_()
    for experts in (apart, pruned):
        experts(x.requires_grad_(), chosen, weights).square().sum().backward()
    for number in range(3):
        for projection, stack in pruned.stacks.items():
            layer = apart.layers(number)[projection]
            for part in ("values", "left", "right", "bias"):
                scale = getattr(layer, part).grad.abs().max()
                assert torch.allclose(getattr(layer, part).grad, getattr(stack, part).grad[number], atol=1e-5 * scale)
    assert apart.layers(3)["down"].values.grad is None


@torch.no_grad()
def test_no_token_and_an_index_that_is_no_experts():
    _, stacked = stacked_of(tiny_model("mixtral"))
    experts = [
        {p: random_layer(bias=False, block=None, shape=tuple(stacked.weight(e, p).shape), seed=e) for p in held}
        for e, held in enumerate(stacked.layers)
    ]
    pruned = FactorizedExperts.of(SeparateExperts(experts, Gating(stacked.module)))
    x, chosen, weights = call_of(stacked)
    assert pruned(x[:0], chosen[:0], weights[:0]).shape == (0, WIDTH)
    foreign = chosen.clone()
    foreign[:, 1] = 4  # what expert parallelism puts in the place of other ranks' experts
    own = weights.clone()
    own[:, 1] = 0
    assert torch.allclose(pruned(x, foreign, weights), pruned(x, chosen, own), atol=1e-4)


def test_each_layer_of_each_expert_is_chosen():
    layers, dense = chosen_layers(tiny_model("qwen3_moe"))
    names = [layer.name for layer in layers if layer.stack]
    assert len(names) == 4 * 3 * BLOCKS and names[0] == "model.layers.0.mlp.experts.0.gate"
    assert {layer.reason for layer in dense} == {"not a linear layer: a weight of a Qwen3MoeTopKRouter"}


def test_experts_are_chosen_all_together():
    model = tiny_model("mixtral")
    layers, _ = chosen_layers(model, ignore=("re:.*experts",))
    assert len(layers) == 4 * BLOCKS
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.experts\.0\.down is ignored by 'down', .*all together"):
        chosen_layers(model, ignore=("down",))


def test_experts_that_transformers_does_not_decorate_are_named():
    config = transformers.Llama4TextConfig(
        **COMMON, **TOKENS, **GROUPED, head_dim=8, num_local_experts=4, intermediate_size_mlp=INNER
    )
    layers, dense = chosen_layers(transformers.AutoModelForCausalLM.from_config(config))
    assert not any(layer.stack for layer in layers)
    experts = {layer.name: layer.reason for layer in dense if "experts" in layer.name}
    assert experts["model.layers.0.feed_forward.experts.gate_up_proj"] == (
        "not a linear layer: weights of three dimensions of a Llama4TextExperts, as of experts that run in a way of "
        "their own"
    )


def test_weights_of_two_dimensions_are_told_with_their_module():
    """As DBRX holds those of all experts."""
    model = tiny_model("llama")
    model.model.layers[1].mlp.experts = nn.Module()
    model.model.layers[1].mlp.experts.w1 = nn.Parameter(torch.ones(4 * INNER, WIDTH))
    layers, dense = chosen_layers(model)
    assert not any(layer.stack for layer in layers)
    told = DenseLayer("model.layers.1.mlp.experts.w1", "not a linear layer: a weight of a Module")
    assert dense == [told]


@pytest.mark.parametrize("change", ["norm", "more", "flat"])
def test_experts_with_more_than_their_products_are_left_alone(change):
    model = tiny_model("mixtral")
    for block in model.model.layers:
        experts = block.mlp.experts
        if change == "norm":
            experts.has_post_expert_norm = True
        elif change == "more":
            experts.scale = nn.Parameter(torch.ones(2, 2))
        else:
            experts.down_proj = nn.Parameter(torch.ones(8, 8))
    layers, dense = chosen_layers(model)
    assert not any(layer.stack for layer in layers)
    told = {"norm": "normalizes what", "more": "holds scale beside", "flat": "has no down_proj of three"}[change]
    assert any(f"of a MixtralExperts, which {told}" in layer.reason for layer in dense)


def test_hidden_states_flow_as_in_the_model():
    model, tokens = tiny_model("deepseek_v3"), random_tokens(1)
    layers = {layer.name: layer.module for layer in chosen_layers(model)[0]}
    with torch.no_grad():
        expected = model(tokens).logits
        with run_by_expert(layers):
            assert torch.allclose(model(tokens).logits, expected, atol=1e-5)
