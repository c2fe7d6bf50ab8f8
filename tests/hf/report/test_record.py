"""A report is written whole, reads back as it was, and is refused with its place where it is not what it should be."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest

from armorfact_hf.report.page import write_report
from armorfact_hf.report.record import FILE, MethodPerplexity, Report, TaskRecord
from armorfact_hf.typed_json import to_json
from tests.hf.report.records import HOSTILE, evaluation, layer, record

VERSION_1 = Path(__file__).with_name("version-1.json")  # written by armorfact 0.1.0, and cut to two layers


def put(folder: Path, found: object) -> Path:
    (folder / FILE).write_text(json.dumps(found), encoding="utf-8")
    return folder


@pytest.fixture
def found():
    """The parsed JSON of a report."""
    return json.loads(json.dumps(to_json(record())))


def test_what_is_written_is_read_back(tmp_path):
    report = replace(record(), layers=(replace(layer(0, HOSTILE), notes=("damped", "again"), block=None),))
    report = replace(report, evaluations=(evaluation(armorfact=math.inf),))
    write_report(report, tmp_path)
    assert Report.read(tmp_path) == report


def without(found: object, *names: str) -> object:
    """Parsed JSON without the keys of those names, at any depth."""
    if isinstance(found, dict):
        return {key: without(value, *names) for key, value in found.items() if key not in names}
    return [without(item, *names) for item in found] if isinstance(found, list) else found


def test_a_report_of_version_1_reads_and_gains_no_more_than_newer_fields(tmp_path):
    (tmp_path / FILE).write_bytes(VERSION_1.read_bytes())
    report = Report.read(tmp_path)
    write_report(report, tmp_path)
    found = json.loads((tmp_path / FILE).read_text(encoding="utf-8"))
    assert found["blocks"] == [] and found["recovery"] is None and found["layers"][0]["factorized_loss"] is None
    newer = ("blocks", "recovery", "factorized_loss", "refine", "passes", "rate", "tail", "tensor_parallel", "origin")
    newer += ("unrounded_loss", "core_dtype", "wrapper_dtype")
    assert without(found, *newer) == json.loads(VERSION_1.read_text(encoding="utf-8"))
    assert report.layers[1].shape == (16, 32) and report.config.ignore == ("v_proj",)
    assert [method.name for method in report.evaluations[0].methods] == ["wanda", "armorfact"]


def test_fields_with_a_default_may_be_missing(found, tmp_path):
    del found["evaluations"], found["tasks"], found["layers"][0]["notes"], found["config"]["rtol"]
    assert Report.read(put(tmp_path, found)) == replace(record(), evaluations=(), tasks=())


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda r: r["layers"][3]["losses"].update(wanda="x"), "layers[3].losses.wanda: expected a number, got 'x'"),
        (lambda r: r["layers"][3]["losses"].update(wanda=True), "layers[3].losses.wanda: expected a number, got True"),
        (lambda r: r["layers"][3].update(losses=[1]), "layers[3].losses: expected an object, got [1]"),
        (lambda r: r["layers"][0].update(shape=[1]), "layers[0].shape: expected a list of 2, got [1]"),
        (lambda r: r["layers"][0].update(shape=[1, 2.5]), "layers[0].shape[1]: expected a whole number, got 2.5"),
        (lambda r: r["layers"][0].update(block=4), "layers[0].block: expected a list of 2, got 4"),
        (lambda r: r["layers"][0].update(notes=[None]), "layers[0].notes[0]: expected text, got None"),
        (lambda r: r["layers"][0].update(depth=1), "layers[0].depth: expected only the keys name, "),
        (lambda r: r["layers"][0].pop("status"), "layers[0].status: expected this key, got only name, "),
        (lambda r: r.update(layers={}), "layers: expected a list, got {}"),
        (lambda r: r["model"].pop("class"), "model.class: expected this key, got only name, dtype, "),
        (lambda r: r["model"].update(architecture="x"), "model.architecture: expected only the keys name, class, "),
        (lambda r: r["totals"].update(bytes="1"), "totals.bytes: expected a whole number, got '1'"),
        (lambda r: r["evaluations"][0].update(bos="1"), "evaluations[0].bos: expected a whole number or null, got '1'"),
        (lambda r: r["evaluations"][0]["methods"][1].pop("name"), "evaluations[0].methods[1].name: expected this key"),
        (lambda r: r["tasks"][0].update(dense=None), "tasks[0].dense: expected a number, got None"),
        (lambda r: r["config"].update(sweeps="x"), "config.sweeps: expected a whole number, got 'x'"),
        (lambda r: r["config"].update(method="x"), "config: method must be one of armorfact, "),
        (lambda r: r["config"].update(block=[1]), "config.block: expected a whole number or text, got [1]"),
        (lambda r: r["config"].update(more=1), "config.more: expected only the keys method, "),
        (lambda r: r.pop("manifest"), "manifest: expected this key, got only format, "),
        (lambda r: r.update(extra=1), "extra: expected only the keys format, "),
        (lambda r: r.update(format=2), "format: expected version 1, got 2"),
        (lambda r: r.pop("format"), "format: expected version 1, got None"),
    ],
)  # fmt: skip
def test_a_report_of_the_wrong_shape_is_refused_with_the_place(change, sentence, found, tmp_path):
    change(found)
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path / FILE}: {sentence}")):
        Report.read(put(tmp_path, found))


@pytest.mark.parametrize("content", ["[]", "null", '"x"', "1"])
def test_json_that_is_no_report_is_refused(content, tmp_path):
    (tmp_path / FILE).write_text(content)
    with pytest.raises(ValueError, match=re.escape(f"{FILE}: expected an object, got ")):
        Report.read(tmp_path)


@pytest.mark.parametrize("content", [None, b"", b"{", b"\xff", b"[" * 100_000])
def test_a_folder_without_a_report_is_named(content, tmp_path):
    if content is not None:
        (tmp_path / FILE).write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path} holds no report of armorfact: ")):
        Report.read(tmp_path)


def test_both_files_are_written_whole(tmp_path):
    first, *rest = record().layers
    report = replace(record(), layers=(replace(first, name=HOSTILE), *rest))
    (tmp_path / "report.json").write_text("of an earlier run")
    write_report(report, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.json"]
    assert json.loads((tmp_path / "report.json").read_text(encoding="utf-8")) == to_json(report)
    assert "demo:tiny" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_a_failed_write_leaves_the_old_files(tmp_path, monkeypatch):
    def refuse(source, target):
        raise OSError("disk full")

    (tmp_path / "report.json").write_text("of an earlier run")
    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(OSError, match="disk full"):
        write_report(record(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]
    assert (tmp_path / "report.json").read_text() == "of an earlier run"


def test_the_mean_loss_is_that_of_the_stored_method_or_of_a_named_one():
    report = record()
    assert report.mean_loss() == pytest.approx(sum(layer.losses["armorfact"] for layer in report.layers) / 8)
    assert report.mean_loss("wanda") == pytest.approx(5.0123 * report.mean_loss())
    del report.layers[5].losses["wanda"]
    with pytest.raises(ValueError, match=f"'wanda' was not measured on {report.layers[5].name}: ask"):
        report.mean_loss("wanda")


def test_newer_figures_replace_those_of_the_same_method_on_the_same_text():
    other = replace(evaluation(wanda=50.0), text="other", sha256="07" * 32)
    report = replace(record(), evaluations=(evaluation(armorfact=40.0, wanda=160.5), other))
    merged = report.merged([evaluation(armorfact=39.0, nowag=100.0)], [])
    assert merged.evaluations[0] == other and merged.tasks == report.tasks
    [_, entry] = merged.evaluations
    assert {method.name: method.perplexity for method in entry.methods} == {
        "wanda": 160.5,
        "armorfact": 39.0,
        "nowag": 100.0,
    }
    assert entry.methods[0] == MethodPerplexity("wanda", 0.02 * 160.5 / 40, 160.5)


def test_newer_scores_replace_those_of_the_same_task_and_number_of_questions():
    few, all_of_them = TaskRecord("piqa", 100, 0.7, 0.5, 0.04), TaskRecord("piqa", 1838, 0.66, 0.6, 0.01)
    report = record().merged([], [few, all_of_them])
    assert report.tasks == (few, all_of_them) and report.evaluations == record().evaluations
