"""Figures of finished folders beside those of their dense model, measured once and kept."""

from __future__ import annotations

import json
import math
import re
import shutil
import threading
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers

import armorfact
from armorfact_hf.data.calibration import Calibration
from armorfact_hf.data.load_model import load_model
from armorfact_hf.data.wheels import cache_folder
from armorfact_hf.evaluation import measure
from armorfact_hf.evaluation.measure import Evaluation, perplexity_of
from armorfact_hf.evaluation.perplexity import Perplexity
from armorfact_hf.evaluation.tasks import TaskScore
from armorfact_hf.files import one_at_a_time
from armorfact_hf.layers.linear import FactorizedLinear
from armorfact_hf.observer import Observer
from armorfact_hf.pruning.resume.manifest import DifferentRun
from armorfact_hf.report.page import write_report
from armorfact_hf.report.record import Report, TaskRecord
from armorfact_hf.runs import compare as comparing
from armorfact_hf.runs import evaluate as measuring
from armorfact_hf.runs import load_to_prune as choosing
from armorfact_hf.runs import prune_to_folder as workflow
from armorfact_hf.runs.compare import compare
from armorfact_hf.runs.compare import rows as rows_of
from armorfact_hf.runs.evaluate import evaluate_folder
from armorfact_hf.runs.inspect import inspect_folder
from tests.hf.models import BLOCKS, random_text
from tests.hf.observers import Silent
from tests.hf.runs.folders import OURS, nbytes, prune, saved, silent

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def other_text(tmp_path) -> Path:
    path = tmp_path / "other.txt"
    path.write_text(random_text(300, seed=1))
    return path


def test_an_evaluation_stands_in_the_report_beside_its_dense_model(model_folder, text_file, other_text, out):
    prune(model_folder, out, text_file, OURS)
    report = evaluate_folder(out, [Evaluation(str(other_text), 5, 24)], observer=Silent())
    assert Report.read(out) == report
    [entry] = json.loads((out / "report.json").read_text())["evaluations"]
    pinned = {"text": "other.txt", "split": "whole file", "window": 24, "stride": 24, "bos": None, "windows": 5}
    assert pinned.items() <= entry.items() and entry["tokens"] == 5 * 23
    assert set(entry) == {*pinned, "sha256", "chosen", "tokens", "dense", "methods"}
    [method] = entry["methods"]
    assert method["name"] == "armorfact" and method["perplexity"] != entry["dense"]
    assert method["mean_loss"] == pytest.approx(
        sum(layer.losses["armorfact"] for layer in report.layers) / len(report.layers)
    )
    shown = (out / "report.html").read_text()
    assert f"{entry['dense']:.2f}" in shown and f"{method['perplexity']:.2f}" in shown


def test_perplexity_is_measured_once_for_a_model_and_a_text(model_folder, text_file, other_text, out, monkeypatch):
    prune(model_folder, out, text_file)
    measured, original = [], measure.evaluate_perplexity
    monkeypatch.setattr(
        measure, "evaluate_perplexity", lambda *given, **more: measured.append(more) or original(*given, **more)
    )
    ways = [Evaluation(str(other_text), 5, 24), Evaluation(str(other_text), 5, 16), Evaluation(str(text_file), 5, 24)]
    for number, way in enumerate(ways, 1):
        first = evaluate_folder(out, [way], observer=Silent())
        assert evaluate_folder(out, [way], observer=Silent()) == first
        assert len(measured) == 2 * number and len(first.evaluations) == number


def test_a_dense_model_that_has_changed_is_not_compared_with(model_folder, text_file, out):
    prune(model_folder, out, text_file)
    saved("llama", model_folder, seed=1)
    with pytest.raises(ValueError, match="model is not the model that was pruned: its weights have changed since"):
        evaluate_folder(out, [Evaluation(str(text_file), 2, 24)], observer=Silent())


def compared(model: Path, out: Path, text: Path, *texts: Path, config=OURS, methods=("wanda",)):
    return compare(
        str(model), out, config, methods, Calibration(str(text), 4, 24), [Evaluation(str(t), 2, 24) for t in texts],
        observer=Silent(),
    )  # fmt: skip


@pytest.mark.parametrize("head", [False, True], ids=["blocks", "blocks and tied head"])
def test_a_comparison_has_a_row_for_each_method_with_its_bytes_on_disk(head, model_folder, text_file, out):
    rows = compared(model_folder, out, text_file, text_file, config=replace(OURS, head=head))
    assert [row.name for row in rows] == ["dense", "wanda", "armorfact"]
    dense, wanda, ours = rows
    folders = [model_folder, out.with_name("pruned-wanda"), out]
    assert [row.bytes for row in rows] == [nbytes(folder) for folder in folders]
    assert wanda.bytes < ours.bytes < dense.bytes
    assert 0 == dense.mean_loss < ours.mean_loss < wanda.mean_loss
    for row in rows:
        assert row.ratio["text.txt"] == row.perplexity["text.txt"] / dense.perplexity["text.txt"]


def test_a_comparison_reuses_what_is_finished(model_folder, text_file, out, monkeypatch):
    rows = compared(model_folder, out, text_file, text_file)
    monkeypatch.setattr(workflow, "prune_job_", None)
    monkeypatch.setattr(measure, "evaluate_perplexity", None)
    assert compared(model_folder, out, text_file, text_file) == rows


def test_every_row_of_a_comparison_has_the_same_texts(model_folder, text_file, other_text, out):
    compared(model_folder, out, text_file, other_text, methods=())
    rows = compared(model_folder, out, text_file, text_file)
    assert rows[0].perplexity.keys() == rows[1].perplexity.keys() == rows[2].perplexity.keys() >= {"text.txt"}


def test_texts_of_the_same_file_name_are_told_apart(model_folder, text_file, other_text, out, tmp_path):
    same_name = tmp_path / "elsewhere" / text_file.name
    same_name.parent.mkdir()
    same_name.write_text(other_text.read_text())
    [dense, _] = compared(model_folder, out, text_file, text_file, same_name, methods=())
    assert len(set(dense.perplexity.values())) == 2


def test_an_evaluation_of_the_folder_alone_keeps_the_figures_of_the_methods_beside_it(model_folder, text_file, out):
    rows = compared(model_folder, out, text_file, text_file)
    before = Report.read(out)
    assert (
        evaluate_folder(out, [Evaluation(str(text_file), 2, 24)], observer=Silent()).evaluations == before.evaluations
    )
    assert rows_of(out, [out.with_name("pruned-wanda")]) == rows


def test_figures_of_evaluations_that_end_at_the_same_time_are_all_kept(model_folder, text_file, out, monkeypatch):
    """Whoever would write waits, and reads what was written meanwhile."""
    prune(model_folder, out, text_file)
    first = evaluate_folder(out, [Evaluation(str(text_file), 2, 24)], observer=Silent())
    write_report(replace(first, evaluations=()), out)
    arrived = threading.Event()

    def arrives(target):
        arrived.set()
        return one_at_a_time(target)

    monkeypatch.setattr(measuring, "one_at_a_time", arrives)
    second = threading.Thread(
        target=evaluate_folder, args=(out, [Evaluation(str(text_file), 3, 24)]), kwargs={"observer": Silent()}
    )
    with one_at_a_time(out / "report.json"):
        second.start()
        assert arrived.wait(60)
        second.join(0.2)
        assert second.is_alive()
        write_report(first, out)
    second.join()
    assert {record.tokens for record in Report.read(out).evaluations} == {2 * 23, 3 * 23}
    assert not list(out.glob(".*"))


def test_a_folder_that_is_not_whole_is_told_before_the_dense_model_is_measured(
    model_folder, text_file, out, tmp_path, monkeypatch
):
    beside, away = tmp_path / "beside", tmp_path / "away"
    prune(model_folder, out, text_file)
    prune(model_folder, beside, text_file, OURS)
    monkeypatch.setattr(measuring, "dense_model", None)
    for broken in (out, beside):
        (broken / "model.safetensors").rename(away)
        with pytest.raises(ValueError, match=f"{broken.name} holds no safetensors file"):
            evaluate_folder(out, beside=[beside], observer=Silent())
        away.rename(broken / "model.safetensors")


def test_a_pruned_model_that_computes_nan_costs_the_others_no_figures(model_folder, text_file, out, monkeypatch):
    prune(model_folder, out, text_file)
    original, said = measuring.perplexity_of, []

    def perplexity(loaded, text, observer):
        if any(isinstance(module, FactorizedLinear) for module in loaded.model.modules()):
            loaded.model.lm_head.weight.data[:] = torch.nan
        return original(loaded, text, observer)

    monkeypatch.setattr(measuring, "perplexity_of", perplexity)
    observer = Silent()
    monkeypatch.setattr(observer, "say", said.append)
    [record] = evaluate_folder(out, [Evaluation(str(text_file), 2, 24)], observer=observer).evaluations
    assert record.dense > 1 and record.methods[0].perplexity == math.inf
    assert any("computes NaN" in sentence and "written down as infinite" in sentence for sentence in said)


def test_a_folder_that_is_made_anew_meanwhile_gets_no_figures(tasks, model_folder, text_file, out, monkeypatch):
    prune(model_folder, out, text_file)

    def meanwhile(*given, **more):
        shutil.rmtree(out)
        prune(model_folder, out, text_file, OURS)
        return []

    monkeypatch.setattr(measuring, "_scores", meanwhile)
    with pytest.raises(ValueError, match="made anew while its model was measured"):
        evaluate_folder(out, [], ["piqa"], 10, observer=Silent())
    assert not Report.read(out).tasks


def test_only_folders_of_one_model_by_different_methods_stand_side_by_side(model_folder, text_file, out, tmp_path):
    prune(model_folder, out, text_file)
    prune(model_folder, tmp_path / "same", text_file)
    prune(saved("gpt2", tmp_path / "gpt2"), tmp_path / "other", text_file, OURS)
    for beside, said in (("same", "by different methods"), ("other", "was pruned from another model")):
        with pytest.raises(ValueError, match=said):
            evaluate_folder(out, [], beside=[tmp_path / beside], observer=Silent())


@pytest.fixture
def tasks(monkeypatch):
    """A scorer of tasks without questions: who was asked, in order."""
    asked = []

    def scored(model, tokenizer, tasks, limit=None, log=print):
        asked.append(any(isinstance(module, FactorizedLinear) for module in model.modules()))
        return [TaskScore(task, 0.25 + len(asked) / 4, 0.125 / len(asked), 10, None) for task in tasks]

    monkeypatch.setattr(measuring, "evaluate_tasks", scored)
    return asked


def test_tasks_are_asked_of_the_dense_model_and_of_the_folder_itself(tasks, model_folder, text_file, out, tmp_path):
    beside = tmp_path / "beside"
    prune(model_folder, out, text_file, OURS)
    prune(model_folder, beside, text_file)
    report = evaluate_folder(out, [], ["piqa"], 10, beside=[beside], observer=Silent())
    assert tasks == [False, True]
    assert report.tasks == (TaskRecord("piqa", 10, 0.5, 0.75, 0.0625),)


def test_one_model_is_in_memory_at_a_time(tasks, model_folder, text_file, out, monkeypatch):
    held, most = [], []

    def load(*given, **more):
        most.append(sum(model() is not None for model in held))
        loaded = load_model(*given, **more)
        held.append(weakref.ref(loaded.model))
        return loaded

    monkeypatch.setattr(measuring, "load_model", load)
    monkeypatch.setattr(choosing, "load_model", load)
    compared(model_folder, out, text_file, text_file, methods=("wanda", "magnitude"))
    evaluate_folder(out, [Evaluation(str(text_file), 1, 24)], ["piqa"], observer=Silent())
    assert most == [0] * 9  # three to prune; the dense one, two beside and its own; the dense one and its own


@pytest.mark.parametrize("library", [armorfact, transformers, torch], ids=lambda library: library.__name__)
def test_perplexity_is_measured_again_by_another_version(library, model_folder, text_file, monkeypatch):
    loaded, evaluation = load_model(str(model_folder), log=silent), Evaluation(str(text_file), 2, 24)
    first = perplexity_of(loaded, evaluation, Silent())
    monkeypatch.setattr(measure, "evaluate_perplexity", None)
    assert perplexity_of(loaded, evaluation, Silent()) == first
    mended = Perplexity(first.perplexity / 2, first.tokens, first.window, first.stride, first.bos)
    monkeypatch.setattr(measure, "evaluate_perplexity", lambda *given, **more: mended)
    # As measure sees it: transformers replaces its own module while it is being imported.
    monkeypatch.setattr(getattr(measure, library.__name__), "__version__", "999.0")
    assert perplexity_of(loaded, evaluation, Silent()) == replace(first, perplexity=first.perplexity / 2)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"key": {}, "found": {"text": 1}}'])
def test_a_damaged_file_of_the_cache_is_named(content, model_folder, text_file):
    loaded, evaluation = load_model(str(model_folder), log=silent), Evaluation(str(text_file), 2, 24)
    first = perplexity_of(loaded, evaluation, Silent())
    [path] = (cache_folder() / "perplexity").iterdir()
    path.write_text(content)
    with pytest.raises(ValueError, match=re.escape(str(path)) + " is damaged .*: delete it"):
        perplexity_of(loaded, evaluation, Silent())
    path.unlink()
    assert perplexity_of(loaded, evaluation, Silent()) == first


def test_a_model_that_computes_otherwise_is_another(model_folder, text_file, out, tmp_path):
    """The weights are the same; the config says what is computed with them."""
    other = tmp_path / "other"
    shutil.copytree(model_folder, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1.0}))
    evaluation = Evaluation(str(text_file), 2, 24)
    found = [perplexity_of(load_model(str(x), log=silent), evaluation, Silent()) for x in (model_folder, other)]
    assert found[0].perplexity != found[1].perplexity
    prune(model_folder, out, text_file, OURS)
    with pytest.raises(DifferentRun, match="model_config"):
        prune(other, out, text_file, OURS)


def test_a_text_that_is_too_short_is_told_before_any_work(model_folder, text_file, out, tmp_path, monkeypatch):
    monkeypatch.setattr(comparing, "prune_to_folder", None)
    short = tmp_path / "short.txt"
    short.write_text(random_text(5))
    with pytest.raises(ValueError, match="one window needs 24 tokens of text, got 5"):
        compared(model_folder, out, text_file, short)
    assert not out.exists()


def test_a_folder_that_is_in_the_way_is_told_before_the_other_methods_are_pruned(
    model_folder, text_file, out, monkeypatch
):
    prune(model_folder, out, text_file, replace(OURS, sweeps=2))
    monkeypatch.setattr(comparing, "prune_to_folder", None)
    with pytest.raises(DifferentRun, match=r"config\.sweeps: 2 there, 1 now"):
        compared(model_folder, out, text_file)
    shutil.rmtree(out)
    begun = out.with_name(f"{out.name}.journal")
    begun.mkdir()
    (begun / "manifest.json").write_text(json.dumps({"config.sweeps": 7}))
    with pytest.raises(DifferentRun, match=r"config\.sweeps: 7 there, 1 now"):
        compared(model_folder, out, text_file)
    shutil.rmtree(begun)
    beside = out.with_name(f"{out.name}-magnitude")
    beside.mkdir()
    with pytest.raises(DifferentRun, match="-magnitude exists and is no folder"):
        compared(model_folder, out, text_file, methods=("wanda", "magnitude"))
    beside.rmdir()
    out.mkdir()
    with pytest.raises(DifferentRun, match="is no folder that armorfact finished"):
        compared(model_folder, out, text_file)


@pytest.mark.parametrize("config", [OURS, replace(OURS, core_dtype="int8")], ids=["", "int8"])
def test_a_dense_model_without_room_is_not_measured(config, model_folder, text_file, out, monkeypatch):
    """What is pruned would have room, and the command has just pruned it from disk for that reason."""
    dense = sum(parameter.nbytes for parameter in load_model(str(model_folder), log=silent).model.parameters())
    monkeypatch.setattr(choosing, "available", lambda device: dense - 1)
    monkeypatch.setattr(comparing, "evaluate_folder", None)
    said, observer = [], Silent()
    observer.say = said.append
    evaluations = [Evaluation(str(text_file), 2, 24)]
    calibration = Calibration(str(text_file), 4, 24)
    compare(str(model_folder), out, config, (), calibration, evaluations, stream=True, observer=observer)
    assert any("Perplexity is not measured" in sentence for sentence in said)


def test_tasks_that_do_not_exist_are_told_before_any_work(model_folder, text_file, out, monkeypatch):
    prune(model_folder, out, text_file, OURS)
    monkeypatch.setattr(measuring, "dense_model", None)
    with pytest.raises(ValueError, match="expected tasks out of"):
        evaluate_folder(out, [], ["nope"], observer=Silent())


def test_one_shot_prunes_the_layers_that_blocks_fit(tmp_path, out, text_file):
    model = saved("llama", tmp_path / "odd", intermediate_size=72)
    compared(model, out, text_file, config=replace(OURS, block=16))
    ours, wanda = ({layer.name for layer in inspect_folder(x)} for x in (out, out.with_name(f"{out.name}-wanda")))
    assert ours == wanda and len(ours) == 4 * BLOCKS


def test_an_observer_is_told_of_plans_steps_and_sentences(model_folder, text_file, out):
    told = []

    class Told(Observer):
        say = plan = step = staticmethod(told.append)

    compare(
        str(model_folder), out, OURS, ("wanda",), Calibration(str(text_file), 4, 24),
        [Evaluation(str(text_file), 2, 24)], observer=Told(),
    )  # fmt: skip
    assert [type(x).__name__ for x in told].count("Plan") == 2
    assert f"Pruning {model_folder} by wanda, into {out}-wanda." in told
    doing = [step.doing for step in told if hasattr(step, "doing")]
    assert doing[-2:] == ["measuring perplexity"] * 2 and doing[0].startswith("decoder block 1 ")
