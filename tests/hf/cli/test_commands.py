"""The command `armorfact` from end to end: what it prints, what it writes, and how it fails."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from armorfact_hf.checkpoint.folder import stored_tensors
from armorfact_hf.cli import commands as cli
from armorfact_hf.cli import tables, terminal
from armorfact_hf.evaluation import measure
from armorfact_hf.report.record import MethodPerplexity, PerplexityRecord, Report
from armorfact_hf.runs import evaluate
from tests.hf.models import random_text

PATHS = [str(Path(__file__).parents[3] / name) for name in ("", "adapters")]
SHORT = ["--length", "24"]
COMMANDS = ("prune", "eval", "inspect", "export", "recover", "teach", "write", "bench", "push")


@pytest.fixture(autouse=True)
def _own_cache_and_terminal(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("ARMORFACT_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(terminal, "console", Console(width=200))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "pruned"


def armorfact(*arguments: object, code: int = 0) -> str:
    """What the command prints; its exit code is checked, and that it never ends by an exception of Python."""
    result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
    unexpected = None if isinstance(result.exception, SystemExit) else result.exception
    assert (result.exit_code, unexpected) == (code, None), result.output
    return result.output


def pruning(model: Path, out: Path, text: Path, *more: object) -> tuple[object, ...]:
    """The arguments of a short pruning command, with a text to evaluate on, unless ``more`` begins with --no-eval."""
    return (
        *("prune", model, "--out", out, "--calibration", text, "--samples", 4, *SHORT, "--method", "wanda"),
        *(() if more[:1] == ("--no-eval",) else ("--text", text, "--windows", 2)),
        *more,
    )


def row(output: str, first: str) -> list[str]:
    """The cells of the table's row that starts with a word."""
    [line] = [line for line in output.splitlines() if line.split()[:1] == [first]]
    return line.split()


def in_words(output: str) -> str:
    """The text of an output, however it was broken into lines."""
    return " ".join(output.split())


def files_below(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


def test_a_model_is_planned_and_pruned_from_disk(model_folder, text_file, out):
    planned = in_words(armorfact(*pruning(model_folder, out, text_file, "--stream", "--dry-run")))
    assert "that stay on disk" in planned and "Disk, at most: " in planned and "Estimated time" in planned
    assert not out.exists()
    done = armorfact(*pruning(model_folder, out, text_file, "--stream", "--states", "memory"))
    assert row(done, "wanda") and "report.html" in done


def test_the_command_prunes_compares_and_reuses(model_folder, text_file, out):
    def run(*more: str) -> list[str]:
        arguments = [
            *("prune", model_folder, "--out", out, "--calibration", text_file, "--samples", 4, *SHORT),
            *("--compare", "wanda", "--text", text_file, "--windows", 2, "--sweeps", 1, *more),
        ]
        done = subprocess.run(
            [sys.executable, "-W", "error", "-m", "armorfact_hf", *map(str, arguments)],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(PATHS), "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
            check=True,
        )
        assert "Traceback" not in done.stderr
        return done.stdout

    first = run()
    assert f"Pruning {model_folder} by wanda, into {out}-wanda." in first
    assert "Plan: 21 linear layers of a model with 30,944 parameters; 0.1 MB become" in first
    dense, wanda, ours = (row(first, name) for name in ("dense", "wanda", "armorfact"))
    assert dense[2] == "1.00" and dense[3] == "0.1"
    assert float(ours[3]) < float(wanda[3]) and float(ours[1]) > 1
    assert first.rstrip().endswith("report.html")
    again = run()
    assert f"{out} is finished already." in again and f"{out}-wanda is finished already." in again
    assert [row(again, name) for name in ("dense", "wanda", "armorfact")] == [dense, wanda, ours]


def test_the_plan_says_what_ranks_cost(model_folder, text_file, out):
    ranks = ("--tensor-parallel", 2, "--method", "armorfact", "--dry-run", "--sweeps", 1)
    output = in_words(armorfact(*pruning(model_folder, out, text_file, *ranks)))
    assert re.search(r"For 2 ranks: each holds at most [\d.]+ MB of these layers, 1\.\d+ times its part", output)
    ranks = ("--tensor-parallel", 3, "--dry-run")
    output = in_words(armorfact(*pruning(model_folder, out, text_file, *ranks), code=1))
    assert "cannot be cut into 3 equal parts" in output


def test_a_dry_run_prints_the_plan_and_writes_nothing(model_folder, text_file, out, tmp_path):
    before = files_below(tmp_path)
    output = armorfact(*pruning(model_folder, out, text_file, "--dry-run", "--ignore", "down_proj"))
    assert re.search(r"Plan: 18 linear layers of .* become .* of dense, of which 0\.000 for wrappers\); about", output)
    assert "Left dense, ignored by 'down_proj': model.layers.0.mlp.down_proj, " in output
    assert re.search(r"Estimated time, from a measured first layer: \d+ s\n", output)
    assert files_below(tmp_path) == before


def test_every_option_reaches_the_settings(model_folder, text_file, out):
    options = {
        "--method": "armorfact",
        "--pattern": "1:4",
        "--block": "8",
        "--tensor-parallel": "2",
        "--shrinkage": "0.5",
        "--target": "output",
        "--init": "nowag",
        "--sweeps": "0",
        "--rtol": "0.25",
        "--include": "re:.*layers.[01].*",
        "--ignore": "v_proj",
        "--baseline": "magnitude",
        "--refine": "block",
        "--passes": "2",
        "--rate": "0.001",
        "--tail": "2",
        "--core-dtype": "int8",
        "--wrapper-dtype": "int8",
    }
    armorfact(*pruning(model_folder, out, text_file, "--no-eval", "--head", *sum(options.items(), ())))
    config = Report.read(out).config.to_dict()
    names = {key: f"--{key.replace('_', '-')}" for key in config} | {"baselines": "--baseline"}
    shown = {names[key]: config[key] for key in config}
    expected = options | {
        "--block": 8,
        "--tensor-parallel": 2,
        "--shrinkage": 0.5,
        "--sweeps": 0,
        "--rtol": 0.25,
        "--passes": 2,
        "--rate": 0.001,
        "--tail": 2,
        "--head": True,
    }
    expected |= {key: [options[key]] for key in ("--include", "--ignore", "--baseline")}
    assert {key: shown[key] for key in expected} == expected
    assert set(names) - {key[2:].replace("-", "_") for key in expected} == {"objective", "propagate", "baselines"}


@pytest.mark.parametrize(("option", "value"), [("--objective", "diagonal"), ("--propagate", "dense")])
def test_the_options_that_do_not_go_with_the_others_reach_the_settings(option, value, model_folder, text_file, out):
    armorfact(
        *pruning(model_folder, out, text_file, "--no-eval", "--method", "armorfact", "--sweeps", 0, option, value)
    )
    assert Report.read(out).config.to_dict()[option[2:]] == value


def test_refine_none_reaches_the_settings(model_folder, text_file, out):
    armorfact(*pruning(model_folder, out, text_file, "--no-eval", "--method", "armorfact", "--refine", "none"))
    assert Report.read(out).config.refine is None


def test_without_evaluation_there_is_no_perplexity(model_folder, text_file, out, monkeypatch):
    monkeypatch.setattr(measure, "evaluate_perplexity", None)
    output = armorfact(*pruning(model_folder, out, text_file, "--no-eval"))
    assert "perplexity" not in output and row(output, "wanda")


def test_eval_shows_dense_pruned_and_ratio(model_folder, text_file, out):
    armorfact(*pruning(model_folder, out, text_file, "--no-eval"))
    output = armorfact("eval", out, "--text", text_file, "--windows", 3, *SHORT)
    [entry] = Report.read(out).evaluations
    dense, pruned = entry.dense, entry.methods[0].perplexity
    cells = row(output, text_file.name)
    assert cells[-4:] == [f"{dense:.3f}", "wanda", f"{pruned:.3f}", f"{pruned / dense:.3f}"]
    assert {"dense", "perplexity", "tokens"} <= set(row(output, "text"))
    alone = armorfact("eval", model_folder, "--text", text_file, "--windows", 3, *SHORT)
    assert row(alone, text_file.name)[-3:] == [f"{dense:.3f}", f"{dense:.3f}", "1.000"]


def test_inspect_lists_every_layer_and_their_sum(model_folder, text_file, out):
    armorfact(*pruning(model_folder, out, text_file, "--no-eval"))
    output = armorfact("inspect", out)
    sizes = {name: tensor.nbytes for name, tensor in stored_tensors(out)}
    cells = row(output, "model.layers.1.mlp.up_proj")
    held = sum(sizes[f"model.layers.1.mlp.up_proj.{part}"] for part in ("values", "positions"))
    assert cells[1:3] == ["64x32", "none"] and cells[-2:] == [f"{held:,}", f"{held / (4 * 64 * 32):.3f}"]
    whole = sum(size for name, size in sizes.items() if name.endswith((".values", ".positions")))
    held, theory = output.splitlines()[-2:]
    assert held == f"21 layers, {whole:,} bytes, 0.5312 of dense; every tensor is whole"
    assert theory == "Theory: 0.5312 for the cores, 0.0000 for the wrappers, 0.5312 together"


def test_export_writes_dense_weights_once(model_folder, text_file, out, tmp_path):
    armorfact(*pruning(model_folder, out, text_file, "--no-eval"))
    dense = tmp_path / "dense"
    assert "Wrote" in armorfact("export", out, "--out", dense)
    assert dict(stored_tensors(dense)).keys() == dict(stored_tensors(model_folder)).keys()
    assert f"{dense} exists already: name a new folder" in armorfact("export", out, "--out", dense, code=1)


def test_a_comparison_shows_texts_that_were_evaluated_earlier(model_folder, text_file, out, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text(random_text(300, seed=1))
    armorfact(*pruning(model_folder, out, text_file))
    armorfact("eval", out, "--text", other, "--windows", 2, *SHORT)
    assert row(armorfact(*pruning(model_folder, out, text_file, "--compare", "magnitude")), "magnitude")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--method", "x"), "method must be one of armorfact, sparsegpt, wanda, nowag, magnitude, got 'x'"),
        (("--pattern", "2-4"), "2-4"),
        (("--block", "many"), "block must be a positive number of channels, 'auto' or 'priced', got 'many'"),
        (("--block", "0"), "block must be a positive number of channels, 'auto' or 'priced', got 0"),
        (("--objective", "nowag", "--shrinkage", "1"), "leave it out, or take objective='gram'"),
        (("--target", "output", "--propagate", "dense"), "it needs objective='gram' and propagate='pruned'"),
        (("--include", "nope"), "'nope' matches no linear layer in the decoder blocks"),
        (("--ignore", "re:("), "is not a regular expression"),
        (("--compare", "wanda,x"), "method must be one of"),
        (("--baseline", "x"), "baselines must be one of"),
        (("--dtype", "int8"), "dtype must be one of auto, float32, bfloat16, float16, float64, got 'int8'"),
        (("--text", "nope.txt"), "'nope.txt' is no text file, and none of the demo texts"),
        (("--samples", "40"), "ask for fewer or shorter windows, or give more text"),
        (("--device", "nope"), "nope"),
        (("--windows", 3, "--no-eval"), "--text and --windows would not act: --no-eval measures nothing"),
        (("--calibration", "nope.txt"), "'nope.txt' is no text file, and none of the demo texts"),
        (("--dry-run", "--text", "nope.txt"), "'nope.txt' is no text file, and none of the demo texts"),
    ],
)
def test_a_bad_option_ends_with_one_sentence_and_nothing_written(options, sentence, model_folder, text_file, out):
    before = files_below(out.parent)
    output = armorfact(*pruning(model_folder, out, text_file, *options), code=1)
    last = output.splitlines()[-1]
    assert last.startswith("Error: ") and sentence in last and "Traceback" not in output
    assert files_below(out.parent) == before


def test_a_limit_of_questions_without_tasks_is_refused(model_folder, text_file):
    assert "--limit 3 would not act" in armorfact("eval", model_folder, "--text", text_file, "--limit", 3, code=1)


def test_a_text_that_is_not_there_is_told_before_the_others_are_read(model_folder, text_file, monkeypatch):
    monkeypatch.setattr(evaluate, "perplexity_of", None)
    texts = ("--text", text_file, "--text", "nope.txt", *SHORT, "--windows", 2)
    assert "'nope.txt' is no text file" in armorfact("eval", model_folder, *texts, code=1)


@pytest.mark.parametrize("width", [80, 120, None])
def test_tables_cut_nothing_off_and_take_no_name_for_markup(width, capsys, monkeypatch):
    name = "data[/x]/wiki[old] :warning:.txt"
    record = PerplexityRecord(1234.5678, name, "every [b]fifth", "5a" * 32, 2048, 1024, 0, 6, "evenly", 12288)
    record = replace(record, methods=(MethodPerplexity("sparsegpt", 0.1, 123456.789),))
    console = terminal.plain_console() if width is None else Console(width=width, markup=False, emoji=False)
    monkeypatch.setattr(terminal, "console", console)
    terminal.show(tables.evaluations([record]))
    printed = capsys.readouterr().out
    for text in (name, "every [b]fifth", "123456.789", "sparsegpt", "12288"):
        if width is None:
            assert text in printed
        assert all(printed.count(letter) >= text.count(letter) for letter in text.replace(" ", ""))
    assert "…" not in printed


@pytest.mark.parametrize("wrong", ["prune m", "prune m --out o --windows 0", "eval m --length 1", "x"])
def test_a_command_that_is_spelled_wrong_is_explained(wrong):
    assert "Usage: " in armorfact(*wrong.split(), code=2)


@pytest.mark.parametrize("command", ["eval", "inspect", "export --out dense"])
@pytest.mark.parametrize("name", ["nothing", "no/thing", "./nothing"])
def test_a_folder_that_does_not_exist_is_named(command, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = armorfact(*command.split(), name, code=1).splitlines()[0]
    assert first.startswith("Error: ") and name.removeprefix("./") in first


def test_a_pruned_folder_is_not_pruned_again(model_folder, text_file, out, tmp_path):
    armorfact(*pruning(model_folder, out, text_file, "--no-eval"))
    assert "is pruned already" in armorfact(*pruning(out, tmp_path / "again", text_file, "--no-eval"), code=1)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example(command):
    shown = in_words(armorfact(command, "--help"))
    assert re.search(rf"Examples?: armorfact {command} \S+", shown)
    assert shown == in_words(armorfact(command, "-h"))


def test_help_names_every_command_without_loading_a_model_library():
    assert all(re.search(rf"\b{command}\b", armorfact("--help")) for command in COMMANDS)
    code = "import sys, armorfact_hf.cli.commands; sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    env = os.environ | {"PYTHONPATH": os.pathsep.join(PATHS)}
    assert subprocess.run([sys.executable, "-c", code], env=env).returncode == 0
