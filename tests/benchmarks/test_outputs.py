"""The output side of the objective: what G is, that it reaches the solver for the layers asked for, and a tiny run."""

from __future__ import annotations

import pytest
import torch

from armorfact_hf import PruneConfig
from armorfact_hf.data.calibration import Calibration
from armorfact_hf.evaluation.measure import Evaluation
from armorfact_hf.pruning.prune import prune_
from benchmarks import results
from benchmarks.evidence import outputs
from benchmarks.evidence.outputs import Form, output_gram, output_grams, output_table, weighing
from tests.hf.models import random_tokens, tiny_model


def test_g_is_that_of_the_rows_of_each_block():
    gradients = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    whole = (gradients.T @ gradients / 5).double()
    found = output_gram(gradients, 3)
    assert found.shape == (2, 3, 3)
    torch.testing.assert_close(found, torch.stack([whole[:3, :3], whole[3:, 3:]]), rtol=1e-6, atol=1e-7)


def test_correlations_are_those_between_the_outputs_of_a_block():
    gram = torch.tensor([[[4.0, 1.0], [1.0, 1.0]], [[1.0, 0.0], [0.0, 9.0]]], dtype=torch.float64)
    assert outputs.correlations({"a.q_proj": gram, "b.q_proj": gram, "a.up_proj": gram[1:]}) == {
        "q_proj": pytest.approx(0.25),
        "up_proj": 0.0,
    }


@pytest.mark.parametrize("form", [Form(mean=0.02), Form(own=1.0)])
def test_an_output_without_words_leaves_g_positive_definite(form):
    gram = torch.diag_embed(torch.tensor([[3.0, 0.0], [1.0, 2.0]], dtype=torch.float64))
    damped = form.damped(gram)
    assert torch.linalg.eigvalsh(damped).min() > 0
    expected = gram / 1.5 * (1 + form.own) + form.mean * torch.eye(2, dtype=torch.float64)
    torch.testing.assert_close(damped, expected, rtol=0, atol=1e-3)


def test_only_layers_of_the_kinds_asked_for_are_weighed():
    losses = {}
    for name, form in {"H": None, "q": Form(mean=0.02, kinds=("q_proj",))}.items():
        model = tiny_model("llama")
        config = PruneConfig(sweeps=2, refine=None, baselines=(), include=("re:.*layers\\.0\\.",))
        blocks = {"model.layers.0.self_attn.q_proj": 4, "model.layers.0.self_attn.k_proj": 4}
        shapes = {layer: model.get_submodule(layer).weight.shape[0] for layer in blocks}
        grams = {
            layer: output_gram(torch.randn(8, shapes[layer], generator=torch.Generator().manual_seed(1)), size)
            for layer, size in blocks.items()
        }
        with weighing(grams, form):
            report = prune_(model, random_tokens(4, 16), config)
        losses[name] = {layer.name.rpartition(".")[2]: layer.losses["armorfact"] for layer in report.layers}
    changed = {layer for layer, loss in losses["H"].items() if loss != losses["q"][layer]}
    assert changed == {"q_proj"}


def test_the_table_is_measured_once(model_folder, text_file, tmp_path, monkeypatch):
    text = Evaluation(str(text_file), 1, 16)
    monkeypatch.setattr(results, "TEXTS", [text, text])
    monkeypatch.setattr(outputs, "dense_figures", lambda model, out: [1.0, 1.0])
    calibration = Calibration(str(text_file), 2, 16)
    table = output_table(str(model_folder), tmp_path, calibration)
    assert all(label in table for label in outputs.FORMS)
    assert "mean correlation" in table
    monkeypatch.setattr(outputs, "measure", None)
    assert output_table(str(model_folder), tmp_path, calibration) == table
    assert output_grams(str(model_folder), calibration)
