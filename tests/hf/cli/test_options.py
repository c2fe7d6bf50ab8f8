"""Every option of a command arrives where the work is done."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from armorfact_hf.cli import commands
from armorfact_hf.data.calibration import Calibration
from armorfact_hf.evaluation.measure import Evaluation
from armorfact_hf.observer import Observer
from armorfact_hf.pruning.config import PruneConfig
from armorfact_hf.recovery.settings import RecoverySettings
from armorfact_hf.runs import compare, evaluate, recover, teach, write


class Arrived(Exception):
    """Ends a command where its work would begin."""


@pytest.fixture
def arriving(monkeypatch):
    """What a function of a module is called with by a command."""

    def given(module, name, *command):
        found = []

        def arrive(*given, **named):
            assert isinstance(named.pop("observer"), Observer)
            found.append((given, named))
            raise Arrived

        monkeypatch.setattr(module, name, arrive)
        result = CliRunner().invoke(commands.app, [str(word) for word in command])
        assert isinstance(result.exception, Arrived), result.output
        return found[0]

    return given


def test_of_prune(arriving):
    words = "m --out o --method wanda --calibration a --calibration b --samples 3 --length 7 --text t --windows 5"
    more = "--compare sparsegpt --dtype float16 --device cpu --states disk --workers 3 --baseline none"
    for streamed, expected in (("--stream", True), ("--no-stream", False)):
        given, named = arriving(compare, "compare", "prune", *words.split(), *more.split(), streamed)
        assert named == {"dtype": "float16", "device": "cpu", "stream": expected, "states": "disk", "workers": "3"}
        config = PruneConfig(method="wanda", baselines=())
        assert given[:4] == ("m", Path("o"), config, ["sparsegpt"])
        assert given[4:] == (Calibration(["a", "b"], 3, 7), [Evaluation("t", 5, 7)])


def test_of_recover(arriving):
    words = "p --out o --train wrappers --steps 3 --rate 0.5 --calibration a --windows 4 --length 7 --teacher t"
    more = "--measure-every 2 --save-every 6 --gradient-checkpointing --seed 9 --device cpu"
    given, named = arriving(recover, "recover_to_folder", "recover", *words.split(), *more.split())
    settings = RecoverySettings("wrappers", 3, 0.5, measure_every=2, gradient_checkpointing=True, seed=9)
    assert given == (Path("p"), Path("o"), settings, Calibration(["a"], 4, 7))
    assert named == {"teacher": "t", "device": "cpu", "save_every": 6}


def test_of_eval(arriving, tmp_path):
    (tmp_path / "report.json").touch()
    words = "--text a --text b --windows 5 --length 7 --stride 3 --tasks piqa,sciq --limit 4 --device cpu"
    given, named = arriving(evaluate, "evaluate_folder", "eval", tmp_path, *words.split())
    texts = [Evaluation("a", 5, 7, 3), Evaluation("b", 5, 7, 3)]
    assert (given, named) == ((tmp_path, texts, ["piqa", "sciq"], 4), {"device": "cpu"})


def test_of_eval_of_a_dense_model(arriving, monkeypatch):
    monkeypatch.setattr("armorfact_hf.data.load_model.load_model", lambda *given: given[:3])
    words = "eval m --text a --windows 5 --length 7 --stride 3 --tasks piqa --limit 4 --dtype float16 --device cpu"
    given, _ = arriving(evaluate, "evaluate_dense", *words.split())
    assert given == (("m", "float16", "cpu"), [Evaluation("a", 5, 7, 3)], ["piqa"], 4)


def test_of_teach(arriving):
    words = "teach m --out o --likeliest 5 --calibration a --windows 4 --length 7 --device cpu"
    given, named = arriving(teach, "teach_to_folder", *words.split())
    assert (*given, *named.values()) == ("m", Path("o"), 5, Calibration(["a"], 4, 7), "cpu")


def test_of_write(arriving):
    words = "write m --out o --tokens 5 --seed 3 --dtype float16 --device cpu"
    given, named = arriving(write, "write_to_file", *words.split())
    assert (given, named) == (("m", Path("o"), 5, 3), {"dtype": "float16", "device": "cpu"})


def test_a_pruned_folder_is_measured_in_its_own_dtype(tmp_path):
    (tmp_path / "report.json").touch()
    result = CliRunner().invoke(commands.app, ["eval", str(tmp_path), "--dtype", "float32"])
    assert result.exit_code == 1 and "in the dtype it is stored in: leave out --dtype" in result.output
