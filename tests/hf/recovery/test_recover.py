"""Recovery of tiny models in memory: it learns, it never harms, it forgives, and it refuses."""

from __future__ import annotations

import json
import math
import threading
from dataclasses import replace

import pytest
import torch
from torch import nn

from armorfact import Pattern
from armorfact_hf.checkpoint.folder import load_pruned, save_pruned
from armorfact_hf.layers.execution import Execution
from armorfact_hf.observer import Observer
from armorfact_hf.pruning.resume.lock import InUse, lock, unlock
from armorfact_hf.pruning.resume.manifest import DifferentRun
from armorfact_hf.recovery.divergence import Divergence
from armorfact_hf.recovery.recover import recover_
from armorfact_hf.recovery.report import Recovery
from armorfact_hf.recovery.run import MOST_HALVINGS, kept_aside
from armorfact_hf.recovery.settings import RecoverySettings
from armorfact_hf.typed_json import from_json, to_json
from tests.hf.models import random_tokens, tiny_model
from tests.hf.recovery.models import dense_model, pruned_layers, pruned_model

TOKENS = random_tokens(16, seed=3)
SETTINGS = RecoverySettings(steps=24, rate=0.004, warm_up=4, measure_every=8)
WILD = RecoverySettings(steps=6, rate=5.0, warm_up=0, measure_every=2)


class Told(Observer):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.sentences, self.steps = [], []

    def say(self, sentence: str) -> None:
        self.sentences.append(sentence)

    def step(self, step) -> None:
        self.steps.append(step)


def recover(model: nn.Module, settings: RecoverySettings = SETTINGS, tokens=TOKENS, teacher=None, **more):
    more = {"observer": Told()} | more
    return recover_(model, tokens, dense_model() if teacher is None else teacher, settings, **more)


def tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def changed(model: nn.Module, before: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}


def aside_divergence(model: nn.Module, teacher: nn.Module) -> float:
    values = [Divergence(model, teacher).of(TOKENS[window]) for window in kept_aside(len(TOKENS))]
    return sum(values) / len(values)


@pytest.mark.parametrize("family", ["gpt2", "gemma3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_divergence_falls_and_is_that_of_the_model_as_saved(family, dtype, tmp_path):
    model, teacher = pruned_model(family, dtype), dense_model(family, torch.bfloat16)
    before = aside_divergence(model, teacher)
    report = recover(model, teacher=teacher)
    assert report.before == before and report.after < 0.9 * before and report.best_step > 0
    save_pruned(model, tmp_path)
    assert aside_divergence(load_pruned(tmp_path), teacher) == report.after
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}


@pytest.mark.parametrize("train", ["factors", "wrappers"])
def test_only_what_is_trained_changes_and_supports_never_do(train):
    model, before = pruned_model(), tensors(pruned_model())
    asked = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    report = recover(model, RecoverySettings(train, steps=20, rate=0.004))
    parts = {"factors": ("left", "right", "values"), "wrappers": ("left", "right")}[train]
    trained = {
        f"{name}.{part}"
        for name, layer in pruned_layers(model).items()
        for part in parts
        if getattr(layer, part) is not None
    }
    assert report.after < report.before
    assert changed(model, before) == trained
    for layer in pruned_layers(model).values():
        assert Pattern.parse("2:4").most_kept(layer.core.dense()) <= 2
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == asked


def test_a_pruned_head_is_trained_with_all_others():
    model = pruned_model(head=True)
    before, head = tensors(model), model.get_output_embeddings()
    report = recover(model)
    assert report.after < 0.9 * report.before and model.get_output_embeddings() is head
    assert {"lm_head.left", "lm_head.right", "lm_head.values"} <= changed(model, before)


def test_a_core_without_wrappers_is_recovered_too():
    report = recover(pruned_model(method="sparsegpt"))
    assert report.after < 0.9 * report.before


def test_a_recovery_that_would_harm_changes_nothing():
    model, before = pruned_model(), tensors(pruned_model())
    report = recover(model, WILD)
    assert max(value for _, value in report.history) > report.before == report.after
    assert report.best_step == 0 and not changed(model, before)


def test_the_best_state_is_the_result_not_the_last(tmp_path):
    model, teacher = pruned_model(), dense_model()
    report = recover(model, RecoverySettings(steps=30, rate=0.3, warm_up=30, measure_every=2), teacher=teacher)
    values = dict(report.history)
    assert 0 < report.best_step < 30 and report.after == values[report.best_step] == min(values.values()) < values[30]
    assert aside_divergence(model, teacher) == report.after


def test_gradient_checkpointing_gives_the_same_bits():
    found = {}
    for checkpointing in (False, True):
        model, runs = pruned_model(), []
        model.transformer.h[0].mlp.register_forward_pre_hook(lambda *_, runs=runs: runs.append(1))
        recover(model, RecoverySettings(steps=6, gradient_checkpointing=checkpointing))
        found[checkpointing] = model, len(runs)
    (kept, once), (again, twice) = found.values()
    assert twice == once + 6  # each step runs a block once more on its way back
    assert not changed(again, tensors(kept))


def test_layers_run_as_they_did_before_with_the_new_weights():
    model = pruned_model()
    chosen = pruned_layers(model)
    for layer in chosen.values():
        layer.use_(Execution.of([(None, "dense")]))
    report = recover(model)
    assert report.best_step > 0
    for name, layer in pruned_layers(model).items():
        assert layer is chosen[name] and layer.execution == Execution.of([(None, "dense")])
        assert torch.equal(layer.merged, layer.weight)


def test_one_window_in_eight_and_at_most_eight_are_kept_aside():
    assert kept_aside(16) == [7, 15] and kept_aside(2) == [1] and kept_aside(7) == [6]
    assert len(kept_aside(200)) == 8 and set(kept_aside(200)) <= set(range(7, 200, 8))


def test_every_pass_sees_every_other_window_once_in_an_order_by_the_seed(monkeypatch):
    seen = []
    backward = Divergence.backward
    monkeypatch.setattr(
        Divergence, "backward", lambda self, window: seen.append(tuple(window.tolist())) or backward(self, window)
    )
    for seed in (0, 7):
        recover(pruned_model(), RecoverySettings(steps=28, seed=seed))
    training = {tuple(TOKENS[k].tolist()) for k in range(16) if k not in kept_aside(16)}
    passes = [seen[k : k + 14] for k in range(0, 56, 14)]
    assert all(set(each) == training for each in passes)
    assert len(set(map(tuple, passes))) == 4


def test_progress_and_report():
    told = Told()
    report = recover(pruned_model(), observer=told)
    assert [step.done for step in told.steps] == list(range(25)) and {step.total for step in told.steps} == {24}
    assert (report.windows, report.kept_aside, report.steps, report.tokens) == (14, 2, 24, 24 * 24)
    assert [step for step, _ in report.history] == [0, 8, 16, 24] and not report.notes
    assert from_json(Recovery, json.loads(json.dumps(to_json(report)))) == report


# What is not finite


def failing(monkeypatch, at, loss=math.nan, gradient=None):
    """From now on the steps ``at`` (from 0) give this loss, and this gradient somewhere."""
    backward, steps = Divergence.backward, iter(range(1000))

    def changed(self, window):
        found = backward(self, window)
        if next(steps) not in at:
            return found
        if gradient is not None:
            next(iter(pruned_layers(self.student.model).values())).left.grad[0, 0, 0] = gradient
            return found
        return loss

    monkeypatch.setattr(Divergence, "backward", changed)


def states(monkeypatch) -> list[dict[str, torch.Tensor]]:
    """The factors at the beginning of every step."""
    found, backward = [], Divergence.backward
    monkeypatch.setattr(
        Divergence, "backward", lambda self, window: found.append(tensors(self.student.model)) or backward(self, window)
    )
    return found


@pytest.mark.parametrize("wrong", [{"loss": math.nan}, {"loss": math.inf}, {"gradient": math.inf}])
def test_a_step_that_is_not_finite_is_undone_and_the_rate_halved(wrong, monkeypatch):
    failing(monkeypatch, at=[3], **wrong)
    seen = states(monkeypatch)
    told = Told()
    report = recover(pruned_model(), RecoverySettings(steps=6, rate=0.004, warm_up=0), observer=told)
    assert len(report.notes) == 1 and "step 4: loss or gradient was not finite" in report.notes[0]
    assert report.notes[0] in told.sentences and report.steps == 6
    for name, tensor in seen[4].items():
        torch.testing.assert_close(tensor, seen[2][name], rtol=0, atol=1e-6)
    assert max((seen[3][name] - seen[2][name]).float().abs().max() for name in seen[2] if "left" in name) > 1e-4
    whole = max((seen[1][name] - seen[0][name]).float().abs().max() for name in seen[0] if "left" in name)
    half = max((seen[5][name] - seen[4][name]).float().abs().max() for name in seen[0] if "left" in name)
    assert half < 0.6 * whole


def test_steps_that_are_never_finite_end_the_run_and_change_nothing(monkeypatch):
    failing(monkeypatch, at=range(1000))
    model, before = pruned_model(), tensors(pruned_model())
    report = recover(model, RecoverySettings(steps=50))
    assert report.steps == len(report.notes) == MOST_HALVINGS + 1 and report.after == report.before
    assert not changed(model, before)


def test_a_model_that_is_not_finite_at_first_is_told_and_kept():
    model, before = pruned_model(), tensors(pruned_model())
    teacher = dense_model()
    with torch.no_grad():
        teacher.transformer.ln_f.weight[0] = math.nan
    with pytest.raises(ValueError, match=r"NaN or infinite logits .*`armorfact eval`"):
        recover(model, teacher=teacher)
    assert not changed(model, before) and not any(layer.training for layer in pruned_layers(model).values())


class Interrupted(Exception):
    """Ends a run in the middle."""


class Interrupting(Told):
    """Ends a run at a step."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at = at

    def step(self, step) -> None:
        if step.done == self.at:
            raise Interrupted


def test_a_run_that_is_interrupted_leaves_the_best_of_it():
    model, teacher = pruned_model(), dense_model()
    layers, before = pruned_layers(model), aside_divergence(pruned_model(), teacher)
    with pytest.raises(Interrupted):
        recover(model, observer=Interrupting(20))
    assert pruned_layers(model) == layers and not any(p.requires_grad for x in layers.values() for p in x.parameters())
    assert aside_divergence(model, teacher) < before


# The folder of a run


def computing_otherwise(model: nn.Module) -> nn.Module:
    model.config.layer_norm_epsilon = 1e-2
    return model


@pytest.fixture
def state(tmp_path):
    """The folder of a run that was interrupted after 12 steps."""
    folder = tmp_path / "state"
    with pytest.raises(Interrupted):
        recover(pruned_model(), state=folder, save_every=5, observer=Interrupting(12))
    return folder


@pytest.mark.parametrize(
    ("change", "differing"),
    [
        ({"settings": RecoverySettings(steps=24, rate=0.02, warm_up=4, measure_every=8)}, "config.rate: 0.004 there"),
        ({"tokens": random_tokens(16, seed=4)}, "calibration: "),
        ({"teacher": tiny_model("gpt2", seed=1)}, "teacher: "),
        ({"model": pruned_model(sweeps=2)}, "pruned: "),
        ({"teacher": computing_otherwise(dense_model())}, "teacher_config: "),
        ({"model": computing_otherwise(pruned_model())}, "pruned_config: "),
    ],
    ids=["settings", "tokens", "teacher", "model", "teacher's config", "model's config"],
)
def test_another_run_is_refused_and_told_what_differs(change, differing, state):
    before = {path.name: path.read_bytes() for path in state.iterdir()}
    with pytest.raises(DifferentRun, match=rf"belongs to another run \({differing}"):
        recover(**{"model": pruned_model(), **change}, state=state)
    assert {path.name: path.read_bytes() for path in state.iterdir()} == before


def test_gradient_checkpointing_may_come_in_halfway(state):
    through, on = pruned_model(), pruned_model()
    report = recover(through)
    resumed = recover(on, replace(SETTINGS, gradient_checkpointing=True), state=state)
    assert resumed.history == report.history and not changed(on, tensors(through))


def test_a_folder_that_is_not_ours_is_kept(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(DifferentRun, match="exists and holds no journal of armorfact"):
        recover(pruned_model(), state=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    "damage", [lambda x: x[: len(x) // 2], lambda x: b"", lambda x: x.replace(b"momentum", b"momentun")]
)
def test_a_damaged_state_is_named_and_made_again(damage, state):
    path = state / "state.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    model, before = pruned_model(), tensors(pruned_model())
    with pytest.raises(ValueError, match=r"state\.safetensors is damaged \(.+\); delete that one file"):
        recover(model, state=state)
    assert not changed(model, before)
    path.unlink()
    recover(model, state=state)
    other = pruned_model()
    recover(other)
    assert not changed(model, tensors(other))


@pytest.mark.parametrize("content", ["", "[]", "{"])
def test_a_damaged_manifest_is_named(content, state):
    (state / "manifest.json").write_text(content)
    with pytest.raises(ValueError, match=r"manifest\.json is damaged .*; delete its folder"):
        recover(pruned_model(), state=state)


def test_another_writer_is_refused(state):
    done = []

    def elsewhere() -> None:
        with pytest.raises(InUse, match="is being written by process"):
            recover(pruned_model(), state=state)
        done.append(True)

    held = lock(state)
    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    unlock(held)
    assert done


# What is refused


@torch.no_grad()
def on_meta() -> nn.Module:
    model = pruned_model()
    model.transformer.h[1].to("meta")
    return model


def inferred() -> nn.Module:
    with torch.inference_mode():
        return pruned_model()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tokens": TOKENS[:1]}, r"two windows of text or more.*got 1"),
        ({"tokens": TOKENS.float()}, r"\(windows, length\) matrix of token numbers"),
        ({"tokens": TOKENS + 96}, "vocabulary has 96"),
        ({"model": dense_model()}, "holds no pruned layer: prune it first"),
        ({"teacher": pruned_model()}, "the teacher is pruned: give the dense model"),
        ({"teacher": tiny_model("gpt2", vocab_size=64)}, "vocabulary of 96, got one of 64"),
        ({"model": pruned_model(method="wanda"), "settings": RecoverySettings("wrappers")}, "no pruned layer has wrap"),
        ({"save_every": 0}, "save_every must be a whole number of at least 1, got 0"),
        ({"model": on_meta()}, r"no gradients can be had .* meta device .*load_pruned\(folder, device\)"),
        ({"model": inferred()}, r"no gradients can be had .*torch\.inference_mode"),
    ],
)
def test_what_cannot_be_recovered_is_refused(arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        recover(**{"model": pruned_model(), **arguments}, state=tmp_path / "state")
    assert not (tmp_path / "state").exists()
