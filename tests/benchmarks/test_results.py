"""The tables of results: a run is measured once for all that it depends on, and goes on where it was stopped."""

from __future__ import annotations

import json

import pytest

from armorfact_hf.data.calibration import Calibration
from armorfact_hf.evaluation.measure import Evaluation
from benchmarks import kept as keeping
from benchmarks import results
from benchmarks.kept import chosen, kept
from benchmarks.results import Run, dense_figures, measure, methods, settings, shrinkage, whole
from tests.hf.models import BLOCKS


@pytest.fixture
def short(text_file, monkeypatch):
    """A text and a few windows of it in place of the demo's."""
    monkeypatch.setattr(results, "TEXTS", [Evaluation(str(text_file), windows=1, length=16)] * 2)
    monkeypatch.setattr(results, "Calibration", lambda windows: Calibration(str(text_file), windows, 24))


def test_a_run_is_measured_once_and_leaves_nothing_but_figures(short, model_folder, tmp_path, monkeypatch):
    out, run = tmp_path / "out", Run("wanda", {"method": "wanda"}, windows=4)
    found = measure(run, str(model_folder), out)
    assert min(found["perplexity"]) > 1 and 0 < found["loss"] < 1 and found["tail"] == []
    assert 0.5 < found["bytes"] < 0.6 and found["overhead"] == 0
    assert min(dense_figures(str(model_folder), out)) > 1 and len(list(out.iterdir())) == 2
    again = Run("another label", {"method": "wanda"}, windows=4)
    monkeypatch.setattr(results, "prune_to_folder", None)
    assert measure(again, str(model_folder), out) == found
    for other in (Run("wanda", {"method": "wanda"}, 3), Run("wanda", {"method": "wanda"}, 4, every=2)):
        with pytest.raises(TypeError):
            measure(other, str(model_folder), out)
    monkeypatch.setattr(keeping, "GENERATION", keeping.GENERATION + 1)
    with pytest.raises(TypeError):
        measure(run, str(model_folder), out)


def test_some_blocks_are_pruned_and_the_last_ones_tuned(short, model_folder, tmp_path):
    few = measure(Run("few", {"method": "wanda"}, windows=4, every=BLOCKS), str(model_folder), tmp_path / "out")
    tuned = measure(Run("tuned", {"sweeps": 1, "passes": 1, "tail": 1}, windows=4), str(model_folder), tmp_path / "out")
    [[before, after]] = tuned["tail"]
    assert before > 0 and after > 0 and few["perplexity"] != tuned["perplexity"]


def test_a_stopped_run_goes_on(short, model_folder, tmp_path, monkeypatch):
    out, run = tmp_path / "out", Run("wanda", {"method": "wanda"}, windows=4)
    monkeypatch.setattr(results, "perplexities", None)
    with pytest.raises(TypeError):
        measure(run, str(model_folder), out)
    [folder] = out.iterdir()
    before = (folder / "report.json").stat().st_mtime_ns
    monkeypatch.setattr(results, "perplexities", lambda loaded: [(folder / "report.json").stat().st_mtime_ns, 1])
    assert measure(run, str(model_folder), out)["perplexity"][0] == before
    assert not folder.exists()


def test_every_line_of_a_table_has_a_label_and_settings_of_its_own():
    for table in (methods, settings, shrinkage, whole):
        runs = list(table())
        assert len({run.label for run in runs}) == len(runs)
        keys = [json.dumps([run.config.to_dict(), run.windows, run.every]) for run in runs]
        assert len(set(keys)) == len(runs)
        assert all(run.config.baselines == () for run in runs)


def test_what_is_kept_is_whole_or_not_there(tmp_path, monkeypatch):
    with pytest.raises(TypeError):
        kept(tmp_path, "name", 1, lambda: object())
    assert list(tmp_path.iterdir()) == []
    assert kept(tmp_path / "new", "name", 1, lambda: [1]) == kept(tmp_path / "new", "name", 1, None) == [1]


def test_a_label_that_is_none_is_refused():
    assert chosen("", ["a", "b c"]) == ["a", "b c"] and chosen(" b c,a", ["a", "b c"]) == ["b c", "a"]
    with pytest.raises(SystemExit, match="expected labels out of a, b c, got d"):
        chosen("a,d", ["a", "b c"])
