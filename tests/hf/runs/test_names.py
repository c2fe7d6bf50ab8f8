"""Folders are named by paths or by strings, and a setting that would not act is refused."""

from __future__ import annotations

import pytest
import torch

import armorfact_hf as hf
from armorfact_hf.data.load_model import load_model
from armorfact_hf.report.record import Report
from tests.hf.observers import Silent
from tests.hf.runs.folders import OURS, silent

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.mark.parametrize("kind", [str, lambda path: path])
def test_folders_may_be_named_by_strings_as_by_paths(kind, model_folder, text_file, tmp_path):
    model, out, dense, recovered, words = (
        kind(path) for path in (model_folder, *(tmp_path / name for name in ("out", "dense", "recovered", "words")))
    )
    text, observer = hf.Calibration(str(text_file), 4, 24), Silent()
    hf.prune_to_folder(model, out, OURS, text, dtype="bfloat16", observer=observer)
    report = hf.evaluate_folder(out, [hf.Evaluation(str(text_file), 2, 24)], observer=observer)
    assert report.model.dtype == "bfloat16" and len(report.evaluations) == 1
    assert {layer.name for layer in hf.inspect_folder(out)} == {layer.name for layer in report.layers}
    assert hf.verify_folder(out).digests
    compared = hf.compare(model, out, OURS, ["wanda"], text, [], dtype="bfloat16", observer=observer)
    assert [row.name for row in compared][1:] == ["wanda", "armorfact"]
    assert hf.evaluate_folder(out, beside=[kind(tmp_path / "out-wanda")], evaluations=[], observer=observer)
    hf.teach_to_folder(model, words, 4, text, observer=observer)
    settings = hf.RecoverySettings(steps=1)
    assert hf.recover_to_folder(out, recovered, settings, text, teacher=words, observer=observer).recovery
    hf.write_to_file(model, tmp_path / "own.txt", 40, observer=observer)
    hf.export_dense(out, dense, silent)
    assert load_model(dense, log=silent).model.dtype == torch.bfloat16


@pytest.mark.parametrize("option", [{"dtype": "bfloat16"}, {"device": "cpu"}, {"stream": False}])
def test_what_would_not_act_on_a_loaded_model_is_refused(option, model_folder, text_file, out):
    loaded = load_model(model_folder, log=silent)
    with pytest.raises(ValueError, match="would not act on a model that is loaded"):
        hf.prune_to_folder(loaded, out, OURS, hf.Calibration(str(text_file), 4, 24), observer=Silent(), **option)
    with pytest.raises(ValueError, match="holds no report"):
        Report.read(out)
