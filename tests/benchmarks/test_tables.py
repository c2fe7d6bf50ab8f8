"""Tables, plots and task means from figures whose answer is known; the whole experiment on a tiny model."""

from __future__ import annotations

import json
from xml.etree import ElementTree

import numpy as np
import pytest

from armorfact_hf.data.calibration import Calibration
from armorfact_hf.pruning import layer as pruning
from armorfact_hf.pruning.config import PruneConfig
from armorfact_hf.report.plots import Tick
from benchmarks.evidence.experiment import Budget, Experiment, Settings, Unfinished, spread_layers
from benchmarks.evidence.methods import METHODS
from benchmarks.evidence.one_pass import OnePass
from benchmarks.evidence.plots import apart, drawing
from benchmarks.evidence.proxies import PROXIES
from benchmarks.evidence.tables import (
    COLUMNS,
    Points,
    correlation,
    correlation_table,
    error_table,
    fact_table,
    ratio_table,
)
from benchmarks.evidence.tasks import Answers, above_chance, accuracy_table, chance, mean_of, paired_table, score
from benchmarks.evidence.whole import factorizing, whole_table
from benchmarks.kept import kept
from tests.hf.models import tiny_model

NAMES = list(METHODS)


def made_figures(layers=8, seed=0):
    """Layers of different importance, whose KL is exactly what G-H foretells; H knows nothing of the importance."""
    generator = np.random.default_rng(seed)
    figures = {"layers": {}, "points": {}}
    for number in range(layers):
        importance, name = float(10 ** generator.uniform(-4, 0)), f"model.layers.{number}.q_proj"
        losses = {method: float(generator.uniform(0.01, 0.1)) for method in NAMES}
        noise = {method: dict(zip(PROXIES, generator.uniform(0.2, 5, len(PROXIES)), strict=True)) for method in NAMES}
        figures["layers"][name] = {
            "importance": importance,
            "energies": dict.fromkeys(PROXIES, 1.0),
            "top tokens of H": 0.5,
            "top tokens of H~": 0.25,
            "top tokens of H~, not clipped": 0.75,
        }
        figures["points"][name] = {
            method: {
                "losses": {proxy: loss * noise[method][proxy] for proxy in PROXIES}
                | {"H": loss, "G-H": loss * importance},
                "kl": [0.4 * loss * importance, 0.6 * loss * importance],
                "seconds": 1.0,
            }
            for method, loss in losses.items()
        }
    return figures


def column(name):
    return next((scale, statistic) for title, scale, statistic in COLUMNS if title == name)


def test_a_perfect_prediction_has_correlation_one():
    points = Points(made_figures(), NAMES)
    assert points.predicted("G-H") == pytest.approx(points.kl)
    for title, scale, statistic in COLUMNS:
        if scale == "predicted":
            assert correlation(points, "G-H", scale, statistic).low == pytest.approx(1), title


def test_a_relative_loss_compares_methods_and_does_not_know_which_layer_matters():
    points = Points(made_figures(), NAMES)
    assert correlation(points, "H", *column("one layer, Spearman")).value == pytest.approx(1)
    assert correlation(points, "H", *column("all, relative loss, Spearman")).value < 0.7
    assert correlation(points, "H", *column("all, predicted KL, Spearman")).value == pytest.approx(1)


def test_differences_between_proxies_are_paired():
    points = Points(made_figures(), NAMES)
    scale, statistic = column("one layer, Pearson")
    each = [correlation(points, name, scale, statistic).value for name in ("H~", "H")]
    found = correlation(points, "H~", scale, statistic, less="H")
    assert found.value == pytest.approx(each[0] - each[1]) and found.high < 0


def test_tables_have_a_line_each():
    figures = made_figures()
    lines = correlation_table(figures, NAMES).splitlines()
    assert len(lines) == 2 + len(PROXIES)
    assert {line.count("|") for line in lines} == {len(COLUMNS) + 2}
    assert len(correlation_table(figures, NAMES, less="H").splitlines()) == 1 + len(PROXIES)
    assert "| model.layers.0.q_proj | 0.500 | 0.250 | 0.750 |" in fact_table(figures)


def test_an_exact_prediction_is_off_by_a_factor_of_one():
    assert "| G-H | 1.00 | 1.00 |" in error_table(made_figures(), NAMES)


def test_ratios_are_geometric_means_over_the_layers():
    figures = made_figures()
    for points in figures["points"].values():
        points["wanda"]["kl"] = [3 * value for value in points["armorfact"]["kl"]]
    table = ratio_table(figures, ["wanda", "armorfact"])
    assert "3.000 (3.000 to 3.000) | 3.000 |" in table and "1.000 (1.000 to 1.000) | 1.000 |" in table


def test_losses_are_means_over_the_layers_that_the_ratios_are_of():
    figures = made_figures()
    whole = ratio_table(figures, ["wanda", "armorfact"])
    first, *others = figures["points"]
    for layer in others:
        del figures["points"][layer]["armorfact"]
    row = ratio_table(figures, ["wanda", "armorfact"]).splitlines()[2].split(" | ")
    point, layer = figures["points"][first]["wanda"], figures["layers"][first]
    assert row[1] == f"{point['losses']['H'] / layer['energies']['H']:.4f}" and row[2] == f"{np.mean(point['kl']):.5f}"
    assert row != whole.splitlines()[2].split(" | ")


@pytest.mark.parametrize("scale", ["relative", "predicted"])
def test_a_drawing_holds_every_point_inside_its_frame(scale):
    figures = made_figures()
    root = ElementTree.fromstring(drawing(figures, NAMES, scale))
    name = "{http://www.w3.org/2000/svg}"
    for panel in root.findall(f"{name}g"):
        dots = panel.findall(f"{name}circle")
        assert len(dots) == 8 * len(NAMES)
        assert all(46 <= float(dot.get("cx")) <= 240 and 24 <= float(dot.get("cy")) <= 180 for dot in dots)
    assert len(root.findall(f"{name}g")) == 4


def test_labels_that_would_overlap_are_left_out():
    ticks = [Tick(at, str(at)) for at in (10, 30, 50, 120)]
    assert [tick.at for tick in apart(ticks, 38)] == [10, 50, 120]


def question(choices, gold):
    return {"context": "", "choices": choices, "gold": gold}


def test_chance_is_the_better_of_guessing_and_of_one_answer():
    assert chance([question(["a", "b"], 0), question(["c", "d"], 1)]) == 0.5
    assert chance([question(["yes", "no"], 0)] * 62 + [question(["yes", "no"], 1)] * 38) == 0.62
    four = [question([f"{k}{c}" for c in "abcd"], k % 4) for k in range(20)]
    assert chance(four) == 0.25


def answers(pattern, right=0.8, wrong=0.4):
    """To questions of two choices, whose first is right: "1" is answered by it, with the probability given."""
    sure = {"1": right, "0": wrong}
    return Answers([[np.log(sure[each]), np.log1p(-sure[each])] for each in pattern], [0] * len(pattern))


def test_the_mean_leaves_out_what_the_dense_model_guesses():
    assert above_chance(0.55, 0.02, 0.5) and not above_chance(0.53, 0.02, 0.5)
    assert mean_of([(0.4, 0.03), (0.8, 0.04)]) == pytest.approx((0.6, 0.025))
    dense = {"sciq": answers("1110" * 10), "boolq": answers("10" * 20), "piqa": answers("11110" * 8)}
    pruned = {"sciq": answers("10" * 20), "boolq": answers("1" * 40), "piqa": answers("10" * 20)}
    found = accuracy_table({"dense": dense, "pruned": pruned}, {"sciq": 0.25, "boolq": 0.62, "piqa": 0.5})
    assert "| pruned | 0.500 ± 0.080 | 1.000 ± 0.000 | 0.500 ± 0.080 | 0.500 ± 0.057 |" in found
    assert "Questions: sciq 40, boolq 40, piqa 40. Not in the mean, as the dense model is at chance: boolq." in found


def test_answers_are_compared_question_by_question():
    dense, first, second = answers("1111" * 10), answers("1110" * 10), answers("1010" * 10)
    assert score(first.right) == pytest.approx((0.75, np.std(first.right, ddof=1) / np.sqrt(40)))
    assert first.probability == pytest.approx(np.where(first.right, 0.8, 0.4))
    found = paired_table(
        {name: {"piqa": each} for name, each in (("dense", dense), ("a", first), ("b", second))}, {"piqa": 0.5}
    )
    error = np.std([0, 0, 0, 1] * 10, ddof=1) / np.sqrt(40)
    assert f"| a | 0.250 ± {error:.3f} | 0.100 ± {0.4 * error:.3f} |  |  |" in found
    assert f"| -0.250 ± {error:.3f} | -0.100 ± {0.4 * error:.3f} |" in found.splitlines()[-1]


def test_another_solver_serves_only_inside_its_context():
    before = pruning.factorize
    with factorizing(solver=OnePass()):
        assert isinstance(pruning.factorize.keywords["solver"], OnePass)
    assert pruning.factorize is before


def test_the_ablation_of_whole_models_is_of_layers_alone(tmp_path):
    solvers, settings = [], []

    def measured(run, model, out):
        solvers.append(getattr(pruning.factorize, "keywords", {}).get("solver"))
        settings.append(run.settings)
        return {"perplexity": [10.0, 20.0], "loss": 0.5, "seconds": 7.0}

    kept(tmp_path, "dense", "tiny", lambda: [1.0, 2.0])
    lines = whole_table("tiny", tmp_path, measure=measured).splitlines()
    assert lines[2:5] == [
        "| dense | 1.00 | 2.00 |  |  |",
        "| one pass | 10.00 | 20.00 | 0.5000 | 7 |",
        "| sparsegpt | 10.00 | 20.00 | 0.5000 | 7 |",
    ]
    assert solvers == [OnePass(), None, None, None, None, None]
    assert all(PruneConfig(**each).matching is None for each in settings)
    assert [each["sweeps"] for each in settings if "sweeps" in each] == [1, 1, 5, 20, 100]


@pytest.fixture
def tiny_experiment(model_folder, text_file, tmp_path):
    """A function that makes the experiment on a tiny model anew."""
    settings = Settings(Calibration(str(text_file), windows=3, length=24), text=str(text_file), windows=2, length=16)
    return lambda seconds=None, depths=None: Experiment(
        str(model_folder), tmp_path / "out", settings, Budget(seconds), depths
    )


def test_every_kind_of_layer_at_three_depths():
    names = [layer.name for layer in spread_layers(tiny_model("llama", num_hidden_layers=12))]
    assert len(names) == 3 * 7
    assert {name.split(".")[2] for name in names} == {"2", "6", "10"}


def test_layers_of_some_depths_only(tiny_experiment):
    one = tiny_experiment(depths=[1])
    one.measure({"wanda": METHODS["wanda"]})
    assert {layer.split(".")[2] for layer in one.figures["points"]} == {"1"}
    with pytest.raises(ValueError, match=r"decoder blocks \[0, 1, 2\].* got \[1, 7\]"):
        tiny_experiment(depths=[1, 7]).measure(METHODS)


def test_a_run_that_was_stopped_goes_on_and_ends_with_the_same_figures(tiny_experiment):
    """Two methods first, then all: what is kept is not measured again, and the rest is what it would have been."""
    two = {name: METHODS[name] for name in NAMES[:2]}
    with pytest.raises(Unfinished):
        tiny_experiment(seconds=-1).measure(METHODS)
    first = tiny_experiment()
    first.measure(two)
    kept = json.loads(first.path.read_text())
    second = tiny_experiment()
    second.measure({name: METHODS[name] for name in NAMES if name != "paper"})
    for layer, points in second.figures["points"].items():
        assert {name: points[name] for name in two} == kept["points"][layer]
        assert all(len(point["kl"]) == 2 and np.isfinite(point["kl"]).all() for point in points.values())
    again = tiny_experiment()
    again.measure(two)
    assert again.figures == second.figures
