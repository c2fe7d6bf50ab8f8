"""Streaming moments are the moments of all inputs together; shared inputs are accumulated once."""

from __future__ import annotations

import pytest
import torch

from armorfact_hf.model.moments import Inputs, Statistics, add_gram_, recorded_inputs
from armorfact_hf.model.nonfinite import first_nonfinite
from armorfact_hf.model.structure import chosen_layers
from tests.hf.models import random_tokens, tiny_model


def modules_of(model, block=0):
    return {layer.name: layer.module for layer in chosen_layers(model)[0] if layer.decoder_block == block}


@torch.no_grad()
def gathered(model, tokens):
    statistics, everything = Statistics(), {}
    for window in tokens.split(1):
        with recorded_inputs(modules_of(model)) as inputs:
            model(input_ids=window)
        statistics.add(inputs)
        for name, leader in inputs.leader.items():
            everything.setdefault(name, []).append(inputs.tensors[leader].flatten(0, -2).double())
    return statistics, {name: torch.cat(parts) for name, parts in everything.items()}


def test_moments_equal_those_of_all_inputs_at_once():
    statistics, everything = gathered(tiny_model("llama"), random_tokens())
    assert len(everything) == 7
    for name, x in everything.items():
        moments = statistics.of(name)
        assert moments.tokens == len(x) == 96
        assert moments.gram.dtype == torch.float64
        torch.testing.assert_close(moments.gram, x.T @ x, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("panel", [1, 3, 7, 11, 64])
def test_a_gram_matrix_by_panels_is_the_whole_product(panel):
    x = torch.randn(20, 11)
    total = torch.eye(11, dtype=torch.float64)
    add_gram_(total, x, panel)
    torch.testing.assert_close(total, torch.eye(11) + (x.T @ x).double(), rtol=1e-5, atol=1e-5, check_dtype=False)
    assert torch.equal(total[:panel, panel:], total[panel:, :panel].T)


@pytest.mark.parametrize(("family", "distinct"), [("llama", 4), ("qwen3", 4), ("phi", 3), ("gpt2", 4)])
def test_each_distinct_input_is_accumulated_once(family, distinct):
    # q, k and v share one and gate and up another; all of Phi's attention and its MLP share the block's normed input.
    statistics, _ = gathered(tiny_model(family), random_tokens(2))
    assert len(statistics.gram) == distinct


def test_equal_values_in_two_tensors_are_not_taken_for_one_input():
    inputs, x = Inputs(), torch.ones(1, 3, 4)
    inputs.see("first", x)
    inputs.see("second", x.clone())
    inputs.see("third", x)
    assert inputs.leader == {"first": "first", "second": "second", "third": "first"}


def test_cross_moments_pair_dense_with_pruned_inputs():
    statistics = Statistics()
    dense, pruned = torch.randn(2, 5, 4, dtype=torch.float64), torch.randn(2, 5, 4, dtype=torch.float64)
    for k in range(2):
        one, other = Inputs(), Inputs()
        one.see("layer", pruned[k])
        other.see("layer", dense[k])
        statistics.add(one, other)
    expected = dense.flatten(0, 1).T @ pruned.flatten(0, 1)
    torch.testing.assert_close(statistics.of("layer").cross, expected, rtol=1e-5, atol=1e-5)


def test_sharing_that_changes_between_passes_is_refused():
    statistics, x = Statistics(), torch.ones(1, 4)
    for second in (x, x.clone()):
        inputs = Inputs()
        inputs.see("a", x)
        inputs.see("b", second)
        if second is x:
            statistics.add(inputs)
    with pytest.raises(RuntimeError, match="b shares its input with b in this pass and with a"):
        statistics.add(inputs)


def test_a_layer_that_is_called_twice_in_one_pass_counts_both_inputs():
    statistics, x, y = Statistics(), torch.randn(1, 5, 4), torch.randn(1, 3, 4)
    layer = torch.nn.Linear(4, 4)
    with recorded_inputs({"layer": layer, "other": (other := torch.nn.Linear(4, 4))}) as inputs:
        layer(x), other(x), layer(input=y)
    statistics.add(inputs)
    both = torch.cat([x[0], y[0]]).double()
    found = statistics.of("layer")
    assert found.tokens == 8
    torch.testing.assert_close(found.gram, both.T @ both)
    assert statistics.of("other").tokens == 5  # which saw only one of the two, and so shares with none


def test_layers_that_share_all_their_calls_share_one_gram_matrix():
    inputs = Inputs()
    for x in (torch.ones(1, 2, 4), torch.ones(1, 3, 4)):
        inputs.see("a", x)
        inputs.see("b", x)
    assert inputs.leader == {"a": "a", "b": "a"}
    assert inputs.tensors["a"].shape == (5, 4)


@pytest.mark.parametrize("dense", [{"layer": torch.ones(1, 3, 4)}, {}])
def test_dense_inputs_of_other_tokens_are_refused(dense):
    given, other = Inputs(), Inputs()
    given.see("layer", torch.ones(1, 2, 4))
    for name, tensor in dense.items():
        other.see(name, tensor)
    with pytest.raises(
        ValueError, match=r"layer is given 2 tokens of a window, and [03] in the dense model: .*experts"
    ):
        Statistics().add(given, other)


def test_hooks_are_removed():
    model = tiny_model("llama")
    with recorded_inputs(modules_of(model)):
        pass
    assert not any(module._forward_pre_hooks for module in model.modules())


@torch.no_grad()
@pytest.mark.parametrize("culprit", ["mlp.up_proj", "input_layernorm", "self_attn.v_proj"])
def test_the_first_module_with_nan_is_named(culprit):
    model = tiny_model("llama")
    block = model.model.layers[1]
    block.get_submodule(culprit).weight[0] = torch.nan
    assert first_nonfinite(block, "layers.1", lambda: model(input_ids=random_tokens(1))) == f"layers.1.{culprit}"


@torch.no_grad()
def test_a_finite_block_has_no_culprit():
    model = tiny_model("llama")
    assert first_nonfinite(model.model.layers[1], "layers.1", lambda: model(input_ids=random_tokens(1))) is None
