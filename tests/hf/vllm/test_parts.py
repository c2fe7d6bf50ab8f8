"""What needs no vLLM: names, the tensors that are taken in, and those that have to be there."""

from __future__ import annotations

import doctest

import pytest
import torch

from armorfact_hf.layers.cuts import Share
from armorfact_hf.vllm import routing
from armorfact_hf.vllm.parts import Part
from armorfact_hf.vllm.routing import part_names, part_number, refusal
from tests.hf.checkpoint.cases import random_layer
from tests.hf.layers.test_cuts import stored_as

PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


@pytest.mark.parametrize(
    ("prefix", "expected"),
    [
        ("model.layers.0.self_attn.qkv_proj", ["q_proj", "k_proj", "v_proj"]),
        ("model.layers.0.self_attn.o_proj", ["o_proj"]),
    ],
)
def test_a_fused_layer_is_its_parts(prefix, expected):
    assert part_names(prefix, PACKED) == [f"model.layers.0.self_attn.{name}" for name in expected]


def test_a_layer_that_is_stored_fused_is_one_part():
    prefix = "model.layers.0.mlp.gate_up_proj"
    assert part_names(prefix, PACKED, {prefix: None}) == [prefix]
    assert len(part_names(prefix, PACKED, {"model.layers.1.mlp.gate_up_proj": None})) == 2


def test_a_name_without_dots_is_itself():
    assert part_names("lm_head", PACKED) == ["lm_head"]


@pytest.mark.parametrize(
    ("shard", "parts", "expected"), [("q", 3, 0), ("k", 3, 1), ("v", 3, 2), (1, 2, 1), (None, 1, 0)]
)
def test_a_tensor_goes_to_its_part(shard, parts, expected):
    assert part_number(shard, parts, "layer") == expected


@pytest.mark.parametrize(("shard", "parts"), [("q", 0), ("v", 2), (2, 2), (-1, 2), (None, 3), ((0, 1), 3), ("x", 3)])
def test_a_part_that_is_not_there_is_refused(shard, parts):
    with pytest.raises(ValueError, match=r"model.qkv_proj: .*--ignore qkv_proj"):
        part_number(shard, parts, "model.qkv_proj")


def test_a_head_is_refused_with_the_way_out():
    assert "lm_head is pruned" in refusal("lm_head", "a ParallelLMHead") and "without --head" in refusal(
        "lm_head", "a head"
    )


def test_a_part_takes_the_share_of_its_rank():
    layer = random_layer("2:4", (8, 16), bias=False, shape=(32, 64))
    part = Part("model.up_proj", Share.of_rows((32, 64), 1, 2), torch.float32, stored_as(layer, "model.up_proj"))
    assert part.missing == {"values", "positions", "left", "right"}
    for name, tensor in layer.state_dict().items():
        part.load(name, tensor)
    x = torch.randn(3, 64)
    assert not part.missing
    torch.testing.assert_close(part.module(x), layer(x)[:, 16:])


def test_a_dense_part_takes_a_weight():
    part = Part("model.k_proj", Share.of_rows((32, 64), 1, 2), torch.bfloat16, None)
    weight = torch.randn(32, 64)
    part.load("weight", weight)
    assert torch.equal(part.module.weight, weight[16:].bfloat16()) and not part.missing


def changed(tensor: torch.Tensor, number: float) -> torch.Tensor:
    tensor = tensor.clone()
    tensor.view(-1)[0] = number
    return tensor


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("values", lambda t: t[:-1], r"expected floating numbers of shape \[32, 32\], got torch.float32 of \[31, 32\]"),
        ("values", lambda t: t.to(torch.uint8), r"got torch.uint8"),
        ("values", lambda t: changed(t, float("nan")), "1 values that are NaN"),
        ("positions", lambda t: t.float(), r"expected uint8 of shape \[32, 8\]"),
        ("positions", lambda t: changed(t, 0), "group 0 of row 0 keeps fewer than 2 of 4"),
        ("left", lambda t: changed(t, float("inf")), "1 values that are NaN or infinite"),
        ("scale", lambda t: t, "model.up_proj is pruned and has values, positions, left, right"),
    ],
)
def test_a_damaged_tensor_is_named(name, damage, message):
    layer = random_layer("2:4", (8, 16), bias=False, shape=(32, 64))
    part = Part("model.up_proj", Share.of_rows((32, 64), 0, 2), torch.float32, stored_as(layer, "model.up_proj"))
    with pytest.raises(ValueError, match=rf"tensor model.up_proj.{name}.*{message}"):
        part.load(name, damage(layer.state_dict().get(name, torch.ones(1))))


def test_the_example_in_a_docstring_is_true():
    assert doctest.testmod(routing) == (0, 1)
