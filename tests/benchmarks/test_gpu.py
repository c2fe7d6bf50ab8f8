"""`make gpu` without a GPU: the dry run, what it keeps, what it refuses, and what a lost process costs."""

from __future__ import annotations

import json
import multiprocessing
import subprocess
from dataclasses import asdict, replace

import pytest
import torch

from armorfact_hf.pruning.config import PruneConfig
from benchmarks.gpu import __main__ as command
from benchmarks.gpu import checks, parts
from benchmarks.gpu.isolation import isolated
from benchmarks.gpu.parts import PARTS, Part, measured
from benchmarks.gpu.report import FAILED, MEASURED, SKIPPED, STOPPED, Figure, Report, Skipped
from benchmarks.gpu.setup import SWEEPS, Setup, small
from benchmarks.gpu.tables import extrapolation, swept_block, tables
from benchmarks.gpu.timer import CpuTimer, medians

DRY = ["--device", "cpu", "--small"]
LAYERS = {"hidden": 4096, "inner": 11008}


@pytest.fixture
def items(monkeypatch):
    """A function that makes the first part one of the items given: labels and work."""

    def replaced(*given):
        part = Part("packed", 1.0, "checks:checks")
        monkeypatch.setitem(PARTS, "packed", part)
        monkeypatch.setattr(Part, "items", lambda self, setup: iter(given))

    return replaced


def report_of(tmp_path, *figures) -> Report:
    return Report(tmp_path / "gpu.json", {"device": "none"}, asdict(Setup()), list(figures))


def sweep(layer: str, seconds: float, part: str = "sweep") -> Figure:
    return Figure(part, {"layer": layer}, {"sweep s": seconds})


def test_the_dry_run_measures_every_part_and_its_tables_name_all_of_them(tmp_path, capsys):
    out = tmp_path / "gpu.json"
    chosen = [name for name in PARTS if name != "tests"]  # a pytest in a pytest: below
    command.main([*DRY, "--out", str(out), "--parts", *chosen])
    assert "0 failed" in capsys.readouterr().out
    report = Report.read(out)
    assert [name for name in chosen if not list(report.of_part(name))] == []
    assert all(value > 0 for figure in report.figures if figure.part != "matching" for value in figure.values.values())
    assert {figure.part for figure in report.figures if figure.status == SKIPPED} >= {"semi_structured", "graphs"}
    assert not swept_block(report).assumed
    assert list(tmp_path.iterdir()) == [out]
    command.main(["--table", str(out)])
    printed = capsys.readouterr().out
    assert all(f"### {name}\n" in printed for name in chosen)
    assert "| layer | dtype | tokens | nn.Linear µs | packed µs | times as fast |" in printed
    assert "- semi_structured: layer=64x64 dtype=bfloat16 tokens=1: skipped: sparse tensor cores are in" in printed


def test_the_tests_are_told_one_by_one_with_their_reasons():
    figures = list(measured("tests", small("cpu")))
    names = [figure.of["test"] for figure in figures]
    assert any("test_triton.py::test_on_a_gpu" in name for name in names) and len(names) == len(set(names))
    if not torch.cuda.is_available():
        assert {(figure.status, figure.note) for figure in figures} == {(SKIPPED, "needs a CUDA device")}


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("tests/a.py::test_x[1, 2] PASSED   [ 50%]", (MEASURED, "")),
        ("tests/a.py::test_x SKIPPED (no cuSPARSELt) [100%]", (SKIPPED, "no cuSPARSELt")),
        ("FAILED tests/a.py::test_x - RuntimeError: CUDA error", (FAILED, "AssertionError: RuntimeError: CUDA error")),
        ("ERROR tests/a.py - ModuleNotFoundError: peft", (FAILED, "AssertionError: ModuleNotFoundError: peft")),
    ],
)
def test_lines_of_pytest(line, expected, items):
    items(*checks._told(line))
    (figure,) = measured("packed", small("cpu"))
    assert (figure.status, figure.note) == expected


def test_tests_without_pytest_are_skipped_by_name(monkeypatch):
    monkeypatch.setattr(checks, "find_spec", lambda name: None)
    (figure,) = measured("tests", small("cpu"))
    assert (figure.status, figure.note) == (SKIPPED, "pytest is not installed")


def test_an_item_that_fails_or_lacks_something_leaves_the_others_alone(items):
    def failing():
        raise RuntimeError("CUDA error: an illegal memory access\nwas encountered")

    def lacking():
        import no_such_module  # noqa: F401

    def skipping():
        raise Skipped("needs something else")

    items(*(({"item": k}, work) for k, work in enumerate([failing, lacking, skipping, lambda: {"time s": 1.0}])))
    found = [(figure.status, figure.note) for figure in measured("packed", small("cpu"))]
    assert found == [
        (FAILED, "RuntimeError: CUDA error: an illegal memory access"),
        (SKIPPED, "no_such_module is not installed"),
        (SKIPPED, "needs something else"),
        (MEASURED, ""),
    ]


def test_a_lost_device_ends_its_part(items, monkeypatch):
    monkeypatch.setattr(parts, "_lost", lambda device: "CUDA error: an illegal memory access")
    items(({"item": 1}, lambda: 1 / 0), ({"item": 2}, dict))
    figures = list(measured("packed", small("cpu")))
    assert [figure.of for figure in figures] == [{"item": 1}, {}] and "answers no more" in figures[1].note


def test_figures_come_out_of_a_process_of_their_own_and_a_killed_one_is_told():
    figures = isolated("packed", replace(small("cpu"), seconds=0.5), 600)  # the rest takes seconds
    assert next(figures).part == "packed"
    (child,) = multiprocessing.active_children()
    child.kill()
    assert list(figures)[-1] == Figure("packed", {}, {}, FAILED, "its process ended with code -9")


def test_a_process_is_ended_at_its_limit():
    assert list(isolated("packed", small("cpu"), 0.2)) == [Figure("packed", {}, {}, STOPPED, "at its limit of 0 s")]
    assert multiprocessing.active_children() == []


def test_the_seconds_are_for_all_parts_together(tmp_path, items, capsys):
    items(({"item": 1}, dict), ({"item": 2}, dict))
    report = report_of(tmp_path)
    command.run(report, small("cpu"), ["packed", "sweep"], 1e-9)
    assert [figure.status for figure in report.figures] == [STOPPED, STOPPED]
    assert "the 0 s were over" in capsys.readouterr().out


def test_a_failure_shows_in_the_exit_code(tmp_path, items):
    items(({"item": 1}, lambda: 1 / 0))
    with pytest.raises(SystemExit) as ended:
        command.main([*DRY, "--out", str(tmp_path / "gpu.json"), "--parts", "packed"])
    assert ended.value.code == 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--device", "cpu"], "add --small"),
        ([*DRY, "--seconds", "0"], "must be above 0, got 0"),
        ([*DRY, "--out", "{folder}"], "exists: name another file"),
        ([*DRY, "--out", "{folder}/missing/gpu.json"], "there is no folder"),
    ],
)
def test_what_cannot_be_done_is_said_before_any_work(given, message, tmp_path):
    with pytest.raises(SystemExit, match=message):
        command.main([text.format(folder=tmp_path) for text in given])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_a_sentence_and_a_code_say_so(tmp_path):
    with pytest.raises(SystemExit, match="sees no CUDA device, so nothing was measured"):
        command.main(["--out", str(tmp_path / "gpu.json")])
    assert not list(tmp_path.iterdir())


def test_the_file_is_whole_after_every_figure_and_keeps_the_last_of_the_same_thing(tmp_path):
    report = report_of(tmp_path)
    report.add(Figure("tests", {"test": "a"}, {}, FAILED, ""))
    report.add(sweep("8x8", 2.0))
    assert len(json.loads(report.path.read_text())["figures"]) == 2
    report.add(Figure("tests", {"test": "a"}, {}, FAILED, "the reason"))
    assert [figure.note for figure in Report.read(report.path).figures] == ["the reason", ""]


def test_another_file_is_refused(tmp_path):
    other = tmp_path / "other.json"
    other.write_text("[]")
    with pytest.raises(ValueError, match="expected figures that `make gpu` wrote"):
        Report.read(other)
    for path, message in ((other, "expected figures"), (tmp_path / "missing.json", "No such file")):
        with pytest.raises(SystemExit, match=message):
            command.main(["--table", str(path)])


def test_a_block_is_extrapolated_from_what_was_measured_and_says_what_was_not(tmp_path):
    report = report_of(tmp_path, Figure("block without sweeps", {"sweeps": 0}, {"block s": 60.0}))
    assert extrapolation(report) == ""
    report.add(sweep("4096x4096", 3.0))
    found = swept_block(report)
    assert found.seconds == pytest.approx(60 + 20 * 3 * (4 + 2 + 11008 / 4096))
    assert extrapolation(report).endswith("Not measured: a sweep of 11008x4096, 4096x11008.")
    report.add(sweep("11008x4096", 5.0, "large sweep"))
    report.add(sweep("4096x11008", 9.0, "large sweep"))
    assert swept_block(report).seconds == pytest.approx(60 + 20 * (4 * 3 + 2 * 5 + 9))
    assert "at least" not in tables(report)


def test_a_block_that_would_outlast_the_seconds_is_not_begun(tmp_path, capsys):
    without = Figure("block without sweeps", {"sweeps": 0}, {"block s": 60.0})
    command.run(report_of(tmp_path, without, sweep("4096x4096", 3.0)), small("cpu"), ["block"], 100)
    assert "stopped: it would take 581 s, and 100 s are left" in capsys.readouterr().out


def test_the_sweeps_are_those_of_the_defaults():
    assert PruneConfig().sweeps == SWEEPS


def test_works_take_turns_after_a_warm_up():
    calls = []
    found = medians(CpuTimer(), {name: lambda name=name: calls.append(name) for name in "ab"}, 0.0, least=2)
    assert calls == list("ababab") and set(found) == set("ab")


def test_make_gpu_names_the_command():
    asked = ["make", "--no-print-directory", "-n", "gpu", "PYTHON=python3"]  # under `make test` it names its folder
    shown = subprocess.run(asked, cwd=checks.ROOT, capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "PYTHONPATH=.:adapters python3 -m benchmarks.gpu"
