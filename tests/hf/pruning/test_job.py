"""A run is made and checked once, and knows all that its result depends on."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn

from armorfact_hf.data import load_model as loading
from armorfact_hf.data.calibration import Calibration
from armorfact_hf.data.load_model import Loaded, load_model
from armorfact_hf.evaluation.measure import Evaluation, perplexity_of
from armorfact_hf.pruning import checks, fitting, job
from armorfact_hf.pruning.config import PruneConfig
from armorfact_hf.pruning.job import make_job
from armorfact_hf.pruning.plan import make_plan
from armorfact_hf.pruning.prune import prune_
from armorfact_hf.pruning.resume.manifest import DifferentRun
from armorfact_hf.runs.prune_to_folder import prune_to_folder
from tests.hf.models import BLOCKS, random_text, random_tokens, tiny_model, word_tokenizer
from tests.hf.observers import Silent, Stepping

QUICK = PruneConfig(method="wanda", baselines=())


@pytest.fixture
def calls(monkeypatch) -> Counter:
    """How often a model is validated, fitted and hashed."""
    counted: Counter = Counter()

    def count(module, name: str) -> None:
        original = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, **more: counted.update([name]) or original(*args, **more))

    for module, name in ((checks, "refuse_pruned"), (job, "fitting_layers"), (job, "checked_tokens")):
        count(module, name)
    count(fitting, "fitting_block")
    for module in (job, loading):
        count(module, "model_fingerprint")
    return counted


def test_a_model_is_validated_fitted_and_hashed_once(calls, model_folder, text_file, tmp_path):
    prune_to_folder(str(model_folder), tmp_path / "out", QUICK, Calibration(str(text_file), 4, 24), observer=Silent())
    assert calls == {
        "refuse_pruned": 1,
        "fitting_layers": 1,
        "checked_tokens": 1,
        "model_fingerprint": 1,
        "fitting_block": 7 * BLOCKS,
    }


def test_a_model_is_hashed_once_for_several_texts(calls, model_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("ARMORFACT_CACHE", str(tmp_path / "cache"))
    loaded = load_model(str(model_folder))
    for seed in range(3):
        text = tmp_path / f"{seed}.txt"
        text.write_text(random_text(100, seed=seed))
        perplexity_of(loaded, Evaluation(str(text), 2, 24))
    assert calls["model_fingerprint"] == 1


@torch.no_grad()
@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.lm_head.weight.mul_(2),
        lambda model: model.set_submodule("lm_head", nn.Linear(32, 96, bias=False)),
        lambda model: prune_(model, random_tokens(), QUICK),
    ],
    ids=["in place", "replaced", "pruned"],
)
def test_a_changed_model_is_hashed_anew(change):
    loaded = Loaded("tiny", tiny_model("llama", tie_word_embeddings=False), word_tokenizer())
    before = loaded.fingerprint
    assert loaded.fingerprint == before
    change(loaded.model)
    assert loaded.fingerprint != before


def test_runs_that_choose_other_layers_have_other_manifests():
    jobs = [
        make_job(tiny_model("llama"), random_tokens(), QUICK, select)
        for select in (None, lambda name, module: "layers.0" in name)
    ]
    assert jobs[0].manifest != jobs[1].manifest
    assert jobs[0].manifest == make_job(tiny_model("llama"), random_tokens(), QUICK).manifest


def test_a_finished_folder_of_other_layers_is_refused(model_folder, text_file, tmp_path):
    def prune(select=None):
        calibration = Calibration(str(text_file), 4, 24)
        return prune_to_folder(
            str(model_folder), tmp_path / "out", QUICK, calibration, observer=Silent(), select=select
        )

    first = prune()
    assert prune() == first
    with pytest.raises(DifferentRun, match=r"\(layers: "):
        prune(lambda name, module: "q_proj" in name)


@pytest.mark.parametrize("config", [QUICK, PruneConfig(sweeps=1, baselines=(), block=4)])
def test_what_wrappers_do_not_fit_is_pruned_without_them_or_left_dense(config):
    # up and gate are 13 x 32, where only a core fits; down is 32 x 13, where not even that does.
    found = make_job(tiny_model("llama", intermediate_size=13), random_tokens(), config)
    chosen, dense = (
        {layer.name.rpartition(".")[2] for layer in layers} for layers in (found.layers, found.dense_layers)
    )
    assert ("up_proj" in chosen) == (config.method == "wanda")
    assert "down_proj" in dense
    assert all((layer.block is None) == bool(layer.unfit) for layer in found.layers)


def test_a_baseline_that_does_not_fit_a_layer_is_left_out_with_a_note():
    config = PruneConfig(method="wanda", baselines=("paper", "nowag"))
    report = prune_(tiny_model("llama", intermediate_size=13), random_tokens(), config)
    for layer in report.layers:
        fits = "mlp" not in layer.name
        assert set(layer.losses) == {"wanda", "nowag"} | ({"paper"} if fits else set())
        assert any("'paper' is left out: no block" in note for note in layer.notes) != fits
    with pytest.raises(ValueError, match=r"'paper' was not measured on model\.layers\.0\.mlp\.gate_proj, "):
        report.mean_loss("paper")


def test_a_plan_leaves_the_model_in_its_mode():
    model = tiny_model("llama").train()
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    make_plan(model, random_tokens(), PruneConfig(sweeps=1))
    assert [module.training for module in model.modules()] == before


class Interrupted(Exception):
    """Ends a run in the middle."""


@pytest.mark.parametrize(
    "settings", [{}, {"target": "output"}, {"propagate": "dense"}, {"head": True}, {"include": ("re:model.layers.2",)}]
)
def test_a_continued_run_counts_as_far_as_it_said(settings, tmp_path: Path):
    config = PruneConfig(sweeps=1, baselines=(), **settings)
    steps = []

    def stop(step):
        if step.doing.startswith(f"decoder block {BLOCKS} of"):
            raise Interrupted

    with pytest.raises(Interrupted):
        prune_(tiny_model("llama"), random_tokens(), config, journal=tmp_path, observer=Stepping(stop))
    prune_(tiny_model("llama"), random_tokens(), config, journal=tmp_path, observer=Stepping(steps.append))
    assert steps[-1].done == steps[-1].total
    found = {step.doing for step in steps if "finished already" in step.doing or "no layer" in step.doing}
    why = "has no layer to prune" if "include" in settings else "is finished already"
    assert found == {f"decoder block {k} {why}" for k in range(1, BLOCKS)}


def test_a_finished_run_with_a_head_counts_to_the_end_again(tmp_path: Path):
    config = PruneConfig(sweeps=1, baselines=(), head=True)
    for _ in range(2):
        steps = []
        prune_(tiny_model("llama"), random_tokens(), config, journal=tmp_path, observer=Stepping(steps.append))
        assert steps[-1].done == steps[-1].total
