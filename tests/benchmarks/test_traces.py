"""Output gradients against autograd through the whole model, Gram matrices and proxies against sums over tokens."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from armorfact_hf.model import token_divergence
from armorfact_hf.model.structure import chosen_layers
from benchmarks.evidence.proxies import PROXIES, Grams, mean_gram, token_weights, top_share
from benchmarks.evidence.traces import Trace, read_trace, trace_window, write_traces
from tests.hf.models import random_tokens, tiny_model

BLOCK = 4


def layers_of(model, depth=1):
    return [layer for layer in chosen_layers(model)[0] if layer.decoder_block == depth]


def reference_gradient(model, layer, tokens, seed):
    """The gradient at a layer's output, by a hook on it and one call of the model."""
    kept = []
    handle = layer.module.register_forward_hook(lambda _, __, output: (output.retain_grad(), kept.append(output))[0])
    logits = model(input_ids=tokens).logits[0]
    handle.remove()
    labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=torch.Generator().manual_seed(seed))[:, 0]
    (-functional.cross_entropy(logits, labels, reduction="sum")).backward()
    model.zero_grad()
    return kept[0].grad[0]


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_gradients_are_those_of_the_likelihood_of_drawn_labels(family):
    model, tokens = tiny_model(family), random_tokens(windows=1)
    layers = layers_of(model)
    found = trace_window(model, layers, tokens, {layer.name: BLOCK for layer in layers}, seed=5)
    for layer in layers:
        gradient = reference_gradient(model, layer, tokens, seed=5)
        torch.testing.assert_close(found[f"importance/{layer.name}"], gradient.square().mean(1), rtol=1e-4, atol=1e-9)
        for block, gram in enumerate(found[f"gram/{layer.name}"]):
            rows = gradient[:, block * BLOCK : (block + 1) * BLOCK]
            torch.testing.assert_close(gram, rows.T @ rows, rtol=1e-3, atol=1e-7)


def test_logits_in_parts_give_the_same_gradients(monkeypatch):
    """With labels that do not depend on how the draws are dealt out: those of a model that is certain."""
    model, tokens = tiny_model("llama"), random_tokens(windows=1)
    with torch.no_grad():
        model.lm_head.weight.mul_(2000)
    layers = layers_of(model)
    blocks = {layer.name: BLOCK for layer in layers}
    whole = trace_window(model, layers, tokens, blocks, seed=0)
    monkeypatch.setattr(token_divergence, "POSITIONS_AT_ONCE", 7)
    torch.testing.assert_close(trace_window(model, layers, tokens, blocks, seed=0), whole)


def test_labels_at_some_positions_stand_for_all():
    """The expected second moment is the same: the mean over many draws comes close to that with every label."""
    model, tokens = tiny_model("llama"), random_tokens(windows=1)
    layer = layers_of(model)[0]

    def mean_trace(every):
        found = [trace_window(model, [layer], tokens, {layer.name: BLOCK}, seed, every) for seed in range(60)]
        return sum(float(part[f"importance/{layer.name}"].sum()) for part in found) / len(found)

    assert mean_trace(3) == pytest.approx(mean_trace(1), rel=0.15)


def test_the_model_is_left_as_it_was():
    model, tokens = tiny_model("llama"), random_tokens(windows=1)
    layers = layers_of(model)
    trace_window(model, layers, tokens, {layer.name: BLOCK for layer in layers}, seed=0)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_what_is_read_is_the_mean_over_windows(tmp_path):
    model, tokens = tiny_model("llama"), random_tokens(windows=3)
    layers = layers_of(model)
    blocks = {layer.name: BLOCK for layer in layers}
    write_traces(tmp_path, model, layers, tokens, blocks, lambda: None)
    query, value = (next(x for x in layers if x.name.endswith(kind)) for kind in ("q_proj", "v_proj"))
    found = read_trace(tmp_path, layers, query)
    each = [trace_window(model, layers, row, blocks, seed) for seed, row in enumerate(tokens.split(1))]
    mean = sum(part[f"gram/{query.name}"].double() for part in each) / (3 * 24)
    torch.testing.assert_close(found.output_gram, mean)
    assert [len(x) for x in found.inputs] == [24, 24, 24]
    shared = read_trace(tmp_path, layers, value)
    assert all(torch.equal(a, b) for a, b in zip(found.inputs, shared.inputs, strict=True))
    assert not torch.equal(found.importance[0], shared.importance[0])


def test_windows_that_are_kept_are_not_traced_again(tmp_path):
    model, tokens = tiny_model("llama"), random_tokens(windows=2)
    layers = layers_of(model)
    blocks = {layer.name: BLOCK for layer in layers}
    write_traces(tmp_path, model, layers, tokens[:1], blocks, lambda: None)
    calls = []
    write_traces(tmp_path, model, layers, tokens, blocks, lambda: calls.append(1))
    assert len(calls) == 1


def test_a_folder_without_traces_says_so(tmp_path):
    with pytest.raises(ValueError, match="holds no traces"):
        read_trace(tmp_path, [], layers_of(tiny_model("llama"))[0])


def random_trace(tokens=60, d_in=8, blocks=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(tokens, d_in, generator=generator)
    gradients = torch.randn(tokens, blocks, BLOCK, generator=generator).double()
    gram = torch.einsum("tbi,tbj->bij", gradients, gradients) / tokens
    importance = gradients.square().mean((1, 2)).float()
    return Trace(list(inputs.split(25)), list(importance.split(25)), gram)


def test_weights_have_mean_one_and_are_cut_before():
    importance = torch.ones(1000)
    importance[0] = 1e6
    plain, cut = token_weights(importance, None), token_weights(importance, 100.0)
    assert plain.mean() == pytest.approx(1) and cut.mean() == pytest.approx(1)
    assert plain[0] == pytest.approx(1000, rel=2e-3)  # all the weight there is
    mean = importance.double().mean()
    assert cut[0] / cut[1] == pytest.approx(float(100 * mean))


def test_gram_matrices_are_sums_over_tokens():
    trace = random_trace()
    x, weights = torch.cat(trace.inputs).double(), torch.rand(60).double()
    expected = sum(w * torch.outer(row, row) for w, row in zip(weights, x, strict=True)) / 60
    torch.testing.assert_close(mean_gram(trace.inputs, weights), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(mean_gram(trace.inputs), x.T @ x / 60, rtol=1e-5, atol=1e-6)


def test_proxies_are_what_their_formulas_say():
    trace, generator = random_trace(), torch.Generator().manual_seed(1)
    weight, residual = (torch.randn(12, 8, generator=generator) for _ in range(2))
    grams = Grams(trace)
    found = grams.energies(residual, weight)
    x, s = torch.cat(trace.inputs).double(), token_weights(torch.cat(trace.importance))
    errors = x @ residual.double().T  # (tokens, d_out)
    output = torch.block_diag(*trace.output_gram)
    column = weight.norm(dim=0)
    row = (weight / column).norm(dim=1)
    diagonal = x.square().mean(0)
    expected = {
        "H": errors.square().sum(1).mean(),
        "diag H": (residual.double().square() * diagonal).sum(),
        "paper": ((residual / row[:, None] / column).double().square() * diagonal).sum(),
        "H~": (s * errors.square().sum(1)).mean(),
        "G-H": ((errors @ output) * errors).sum(1).mean(),
        "G-H~": (s * ((errors @ output) * errors).sum(1)).mean(),
    }
    expected["H + diag H"] = expected["H"] + expected["diag H"]
    assert found == pytest.approx({name: float(expected[name]) for name in PROXIES}, rel=1e-5)


def test_equal_importance_and_isotropic_gradients_change_nothing():
    trace = random_trace()
    trace = Trace(trace.inputs, [torch.full((len(x),), 0.3) for x in trace.inputs], torch.eye(BLOCK).double()[None] * 2)
    trace = Trace(trace.inputs, trace.importance, trace.output_gram.repeat(3, 1, 1))
    residual = torch.randn(12, 8, generator=torch.Generator().manual_seed(1))
    found = Grams(trace).energies(residual, residual)
    assert found["H~"] == pytest.approx(found["H"])
    assert found["G-H~"] == pytest.approx(2 * found["H"])


def test_the_top_share():
    assert top_share(torch.tensor([1.0] * 99 + [101.0])) == pytest.approx(101 / 200)
    assert top_share(torch.ones(1000)) == pytest.approx(0.01)
