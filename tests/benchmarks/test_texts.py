"""What the evidence on kinds of text is measured on, that it is the divergence by hand, and that it is kept."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional

from armorfact_hf.data import demo_text
from armorfact_hf.data.calibration import Calibration
from armorfact_hf.data.load_model import load_model
from armorfact_hf.runs.prune_to_folder import prune_to_folder
from benchmarks.evidence import texts
from benchmarks.evidence.folders import key_of, reports_of
from benchmarks.evidence.texts import divergence_table, kinds, text_table
from tests.hf.models import random_text
from tests.hf.observers import Silent
from tests.hf.runs.folders import QUICK


@pytest.fixture(autouse=True)
def sources(monkeypatch):
    """Random words in place of what packages carry."""
    monkeypatch.setattr(demo_text, "fetch_articles", lambda log: [random_text(80)] * 5)
    monkeypatch.setattr(demo_text, "fetch_second_domain", lambda log: random_text(90))
    monkeypatch.setattr(demo_text, "library_sources", lambda: {f"module{n}.py": random_text(70) for n in range(20)})
    questions = [{"context": "w1 w2", "choices": ["w3", "w4 w5"], "gold": gold} for gold in (0, 1, 0)]
    monkeypatch.setattr(texts, "fetch_questions", lambda: {"piqa": questions, "lambada": questions})
    monkeypatch.setattr(texts, "LENGTH", 16)


def test_the_divergence_of_every_kind_is_measured_and_kept(model_folder, text_file, tmp_path, monkeypatch):
    out, kept = tmp_path / "out", tmp_path / "evidence"
    prune_to_folder(str(model_folder), out, QUICK, Calibration(str(text_file), 4, 24), observer=Silent())
    dense, pruned = (load_model(str(folder), log=lambda _: None) for folder in (model_folder, out))
    found = kinds(dense, length=16)
    assert list(found) == ["gensim-enwiki", "qasper", "python", "piqa"]
    assert [len(found[kind]) for kind in found] == [5, 5, 12, 3]
    [line] = text_table([out], kept).splitlines()[2:]
    for windows, cell in zip(found.values(), line.split(" | ")[1:], strict=True):
        by_hand = []
        for window in windows:
            with torch.no_grad():
                p, q = (each.model(window[None]).logits[0].log_softmax(-1) for each in (dense, pruned))
            by_hand.append(float(functional.kl_div(q, p, reduction="none", log_target=True).sum(-1).mean()))
        assert cell.startswith(f"{np.mean(by_hand):.3f} ± {np.std(by_hand, ddof=1) / len(by_hand) ** 0.5:.3f}")
    monkeypatch.setattr(texts, "TokenDivergence", None)
    assert text_table([out], kept).splitlines()[2] == line
    (out / "config.json").write_text((out / "config.json").read_text() + "\n")  # something else in the same folder
    with pytest.raises(TypeError):
        text_table([out], kept)


def test_folders_that_would_be_taken_for_each_other_are_refused(model_folder, text_file, tmp_path):
    for name in ("a/pruned", "b/pruned", "dense"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        calibration = Calibration(str(text_file), 4, 24)
        prune_to_folder(str(model_folder), tmp_path / name, QUICK, calibration, observer=Silent())
    for names in (("a/pruned", "b/pruned"), ("a/pruned", "dense")):
        with pytest.raises(ValueError, match="expected folders of different names"):
            reports_of([tmp_path / name for name in names])
    with pytest.raises(ValueError, match="expected one or more folders"):
        reports_of([])
    before = key_of(tmp_path / "a" / "pruned")
    assert before == key_of(tmp_path / "b" / "pruned")
    (tmp_path / "a" / "pruned" / "config.json").write_text("{}")
    assert key_of(tmp_path / "a" / "pruned") != before


def test_a_line_tells_its_share_of_the_first():
    first, second = {"piqa": np.array([1.0, 3.0])}, {"piqa": np.array([0.5, 0.5])}
    assert divergence_table({"a": first, "b": second}).splitlines()[2:] == [
        "| a | 2.000 ± 1.000 |",
        "| b | 0.500 ± 0.000, 0.25 |",
    ]
