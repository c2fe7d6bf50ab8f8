"""`armorfact bench`: every way to run a layer is timed, the fastest is chosen, written, and found again on loading."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from armorfact_hf import Calibration, Execution, PruneConfig, load_pruned, prune_, prune_to_folder
from armorfact_hf.bench import layers as bench
from armorfact_hf.bench import models
from armorfact_hf.bench import timing as clock
from armorfact_hf.bench.layers import Timing, bench_folder, choose, crossover, time_layers
from armorfact_hf.checkpoint.measured import (
    FILE,
    device_name,
    read_measured,
    shape_key,
    use_measured_,
    write_measured,
)
from armorfact_hf.layers.execution import PACKED, UNPACKED
from armorfact_hf.layers.linear import FactorizedLinear
from tests.hf.cli.test_commands import _own_cache_and_terminal, armorfact, row  # noqa: F401 (an autouse fixture)
from tests.hf.models import random_text, random_tokens, tiny_model, word_tokenizer
from tests.hf.observers import Silent

CPU = torch.device("cpu")
MIXED = Execution(((4, "unpacked"), (None, "packed")))
SHAPES = {"16x32 in 8x8", "32x32 in 8x8", "64x32 in 8x8", "32x64 in 8x8"}  # of the tiny Llama


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """Three rounds for each figure."""
    monkeypatch.setattr(clock, "SECONDS", 0)


@pytest.fixture(scope="module")
def pruned(tmp_path_factory) -> Path:
    """A folder that `armorfact prune` wrote, of a dense model that is still there."""
    base = tmp_path_factory.mktemp("bench")
    tiny_model("llama").save_pretrained(base / "model")
    word_tokenizer().save_pretrained(base / "model")
    (base / "text.txt").write_text(random_text(400))
    calibration = Calibration(str(base / "text.txt"), 4, 24)
    config = PruneConfig(sweeps=1, baselines=(), block=8)
    prune_to_folder(str(base / "model"), base / "pruned", config, calibration, observer=Silent())
    return base / "pruned"


@pytest.fixture
def folder(pruned, tmp_path) -> Path:
    """A copy to write into."""
    return Path(shutil.copytree(pruned, tmp_path / "pruned"))


def layers(model) -> list[FactorizedLinear]:
    return [module for module in model.modules() if isinstance(module, FactorizedLinear)]


def choices_of(model) -> set[Execution | None]:
    return {layer.execution for layer in layers(model)}


def logits(model):
    with torch.no_grad():
        return model(random_tokens(2, seed=1)).logits


def timing(tokens: int, shape: str = "8x8", **seconds: float) -> Timing:
    return Timing(shape, tokens, 1, seconds["dense"], seconds, 0.0)


@st.composite
def many_timings(draw) -> list[Timing]:
    """Of up to three shapes, each at up to six numbers of tokens, in any order; no two times are equal."""
    found = []
    for shape in ("8x8", "8x16", "16x8")[: draw(st.integers(1, 3))]:
        names = ["dense", "unpacked", *draw(st.sets(st.sampled_from(["packed", "semi_structured"])))]
        for tokens in draw(st.sets(st.integers(1, 40), min_size=1, max_size=6)):
            seconds = draw(st.permutations(range(1, len(names) + 1)))
            found.append(timing(tokens, shape, **dict(zip(names, seconds, strict=True))))
    return draw(st.permutations(found))


# The choice among timings


@given(timings=many_timings(), allow_dense=st.booleans())
def test_the_fastest_allowed_strategy_is_chosen_at_every_measured_number(timings, allow_dense):
    chosen = choose(timings, allow_dense)
    assert chosen.keys() == {found.shape for found in timings}
    for found in timings:
        strategy = chosen[found.shape].at(found.tokens)
        allowed = [time for name, time in found.seconds.items() if allow_dense or name != "dense"]
        assert found.seconds[strategy] == min(allowed)
        assert allow_dense or strategy != "dense"


@given(timings=many_timings())
def test_sparse_is_faster_up_to_the_crossover(timings):
    for shape, limit in crossover(timings).items():
        group = {found.tokens: found for found in timings if found.shape == shape}
        faster = {tokens: min(found.seconds, key=found.seconds.get) != "dense" for tokens, found in group.items()}
        until = [tokens for tokens in sorted(group) if all(faster[n] for n in group if n <= tokens)]
        assert limit == max(until, default=None)


def test_borders_lie_between_the_measured_numbers():
    timings = [
        timing(1, dense=3, packed=1, unpacked=2),
        timing(16, dense=3, packed=2, unpacked=1),
        timing(64, dense=3, packed=2, unpacked=1),
        timing(256, dense=1, packed=2, unpacked=3),
    ]
    assert choose(timings)["8x8"] == Execution(((4, "packed"), (128, "unpacked"), (None, "packed")))
    assert choose(timings, allow_dense=True)["8x8"] == Execution(((4, "packed"), (128, "unpacked"), (None, "dense")))
    assert choose(timings[1:3])["8x8"] == UNPACKED
    assert crossover(timings) == {"8x8": 64} and crossover(timings[3:]) == {"8x8": None}


def test_the_least_time_wins_in_a_timing():
    found = timing(1, dense=1, packed=3, unpacked=2)
    assert found.fastest() == "dense" and found.fastest(allow_dense=False) == "unpacked"


# Timing layers


def small_model(dtype=torch.float32, **changes):
    model = tiny_model("llama", dtype=dtype)
    prune_(model, random_tokens(), PruneConfig(**{"sweeps": 1, "baselines": (), "block": 8} | changes))
    return model


def test_every_shape_is_timed_at_every_number_of_tokens():
    model, told = small_model(), []
    before = logits(model)
    held = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    timings = time_layers(model, [30, 1, 30], lambda *step: told.append(step))
    assert {(found.shape, found.tokens) for found in timings} == {(shape, n) for shape in SHAPES for n in (1, 30)}
    assert len(timings) == 2 * len(SHAPES)
    counts = {shape: sum(shape_key(layer) == shape for layer in layers(model)) for shape in SHAPES}
    for found in timings:
        assert found.seconds.keys() == {"dense", "packed", "unpacked"}
        assert min(found.seconds.values()) > 0 and found.dense == found.seconds["dense"]
        assert found.layers == counts[found.shape] and found.wrappers < 1
    assert [step[1:] for step in told] == [(done, 8) for done in range(8)]
    assert all(str(found.tokens) in step[0] for found, step in zip(timings, told, strict=True))
    assert choices_of(model) == {None} and torch.equal(logits(model), before)
    assert all(torch.equal(tensor, held[name]) for name, tensor in model.state_dict().items())
    assert all(layer.merged is None for layer in layers(model))


def test_a_pattern_that_is_not_packed_is_timed_without_it():
    timings = time_layers(small_model(pattern="4:8"), [2])
    assert all(found.seconds.keys() == {"dense", "unpacked"} for found in timings)
    assert {name for choice in choose(timings).values() for name in choice.strategies} == {"unpacked"}


def test_timing_changes_no_choice_whatever_the_working_folder_holds(tmp_path, monkeypatch):
    model = small_model()
    write_measured(tmp_path, CPU, torch.float32, dict.fromkeys(SHAPES, UNPACKED))
    monkeypatch.chdir(tmp_path)
    layers(model)[0].use_(MIXED)
    time_layers(model, [1])
    assert layers(model)[0].execution == MIXED
    assert {layer.execution for layer in layers(model)[1:]} == {None}


def test_layers_beyond_the_room_for_dense_weights_are_left_out(monkeypatch):
    monkeypatch.setattr(bench, "DENSE_BYTES", 2 * 64 * 32 * 4)
    counts = {found.shape: found.layers for found in time_layers(small_model(), [1])}
    assert counts["64x32 in 8x8"] == 2 and counts["16x32 in 8x8"] == 6
    monkeypatch.setattr(bench, "DENSE_BYTES", 1)
    assert {found.layers for found in time_layers(small_model(), [1])} == {1}


@pytest.mark.parametrize("tokens", [[], [0], [4, 0], [-1]])
def test_numbers_of_tokens_below_one_are_refused(tokens):
    with pytest.raises(ValueError, match="expected numbers of tokens of at least 1, got"):
        time_layers(tiny_model("llama"), tokens)


def test_a_dense_model_is_refused():
    with pytest.raises(ValueError, match="holds no pruned layer: name a folder"):
        time_layers(tiny_model("llama"), [1])


# What is kept beside a checkpoint


def test_choices_are_read_as_they_were_written(tmp_path):
    assert read_measured(tmp_path, CPU, torch.float32) == {}
    half, whole = {"8x8": MIXED, "8x16": PACKED}, {"8x8": UNPACKED}
    path = write_measured(tmp_path, CPU, torch.float16, half)
    write_measured(tmp_path, CPU, torch.float32, whole)
    assert path == tmp_path / FILE and [found.name for found in tmp_path.iterdir()] == [FILE]
    assert read_measured(tmp_path, CPU, torch.float16) == half
    assert read_measured(tmp_path, CPU, torch.float32) == whole
    assert read_measured(tmp_path, CPU, torch.bfloat16) == {}
    write_measured(tmp_path, CPU, torch.float16, whole)
    assert read_measured(tmp_path, CPU, torch.float16) == whole


def test_choices_for_other_devices_are_kept(tmp_path):
    theirs = {"Some GPU": {"float16": {"8x8": [[None, "semi_structured"]]}}}
    (tmp_path / FILE).write_text(json.dumps({"version": 1, "devices": theirs}))
    assert read_measured(tmp_path, CPU, torch.float16) == {}
    write_measured(tmp_path, CPU, torch.float16, {"8x8": PACKED})
    devices = json.loads((tmp_path / FILE).read_text())["devices"]
    assert devices == theirs | {device_name(CPU): {"float16": {"8x8": [[None, "packed"]]}}}


def test_a_device_has_one_name():
    before, name = torch.get_num_threads(), device_name(CPU)
    assert name == device_name(torch.device("cpu")) and name.endswith(f", {before} threads")
    assert name.partition(",")[0].strip() and not name.startswith(",")
    try:
        torch.set_num_threads(before + 1)
        assert device_name(CPU) == name.replace(f", {before} threads", f", {before + 1} threads")
    finally:
        torch.set_num_threads(before)
    assert device_name(torch.device("meta")) == "meta"


def test_a_shape_has_its_blocks_in_its_key():
    assert shape_key(FactorizedLinear(8, 16)) == "8x16"
    assert shape_key(FactorizedLinear(8, 16, block=(2, 4))) == "8x16 in 2x4"


def test_each_layer_runs_as_its_shape_was_measured(folder):
    model = load_pruned(folder)
    wanted = {"16x32 in 8x8": PACKED, "64x32 in 8x8": MIXED, "32x64 in 8x8": Execution.always("dense")}
    write_measured(folder, CPU, torch.float32, wanted)
    assert use_measured_(model, folder) is model
    assert all(layer.execution == wanted.get(shape_key(layer)) for layer in layers(model))
    assert {shape_key(layer) for layer in layers(model) if layer.merged is not None} == {"32x64 in 8x8"}
    other = use_measured_(load_pruned(folder, dtype=torch.bfloat16), folder)
    assert choices_of(other) == {None}


DAMAGED = {
    "cut": '{"version": 1, "devi',
    "empty": "",
    "no object": "[]",
    "another version": '{"version": 2, "devices": {}}',
    "no version": "{}",
    "no devices": '{"version": 1}',
    "devices as a list": '{"version": 1, "devices": []}',
    "a dtype as a list": '{"version": 1, "devices": {"DEVICE": {"float32": []}}}',
    "an unknown strategy": '{"version": 1, "devices": {"DEVICE": {"float32": {"32x32 in 8x8": [[null, "fast"]]}}}}',
    "no last": '{"version": 1, "devices": {"DEVICE": {"float32": {"32x32 in 8x8": [[4, "packed"]]}}}}',
    "no pairs": '{"version": 1, "devices": {"DEVICE": {"float32": {"32x32 in 8x8": 5}}}}',
    "no text": b"\xff\xfe\x00",
    "nested deeply": "[" * 100_000 + "]" * 100_000,
    "a long number": '{"version": ' + "1" * 5000 + "}",
    "a strategy as a list": '{"version": 1, "devices": {"DEVICE": {"float32": {"32x32 in 8x8": [[null, []]]}}}}',
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_file_is_not_used_with_one_warning(damage, folder):
    content = DAMAGED[damage]
    if isinstance(content, str):
        content = content.replace("DEVICE", device_name(CPU)).encode()
    (folder / FILE).write_bytes(content)
    with pytest.warns(UserWarning, match=rf"{FILE} is not used \(.*`armorfact bench` writes it anew") as told:
        model = load_pruned(folder)
    assert len(told) == 1 and choices_of(model) == {None}


@pytest.mark.parametrize("make", ["mkdir", "mkfifo"])
def test_what_is_no_file_is_not_used_with_one_warning(make, folder):
    if not hasattr(os, make):
        pytest.skip("this system has no pipes with names")
    getattr(os, make)(folder / FILE)
    with pytest.warns(UserWarning, match=rf"{FILE} is not used \(it is no file\)") as told:
        model = load_pruned(folder)
    assert len(told) == 1 and choices_of(model) == {None}


@pytest.mark.parametrize("damage", DAMAGED)
def test_bench_writes_a_damaged_file_anew(damage, folder):
    content = DAMAGED[damage]
    content = content.replace("DEVICE", device_name(CPU)).encode() if isinstance(content, str) else content
    (folder / FILE).write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bench_folder(folder, [1], device="cpu", log=lambda sentence: None)
    assert read_measured(folder, CPU, torch.float32).keys() == SHAPES


def test_a_choice_that_the_pattern_refuses_is_not_used(tmp_path):
    model = small_model(pattern="4:8")
    model.save_pretrained(tmp_path)
    write_measured(tmp_path, CPU, torch.float32, {"16x32 in 8x8": UNPACKED, "64x32 in 8x8": PACKED})
    with pytest.warns(UserWarning, match="got 4:8 in torch.float32"):
        assert choices_of(load_pruned(tmp_path)) == {None}


@pytest.mark.parametrize("allow_dense", [False, True])
def test_loading_follows_what_bench_wrote(folder, allow_dense, monkeypatch):
    before = logits(load_pruned(folder))
    times = {"dense": 1.0, "unpacked": 2.0, "packed": 3.0}
    monkeypatch.setattr(bench, "time_side_by_side", lambda forms, x: {name: times.get(name, 1.0) for name in forms})
    timings = bench_folder(folder, [1, 16], device="cpu", allow_dense=allow_dense, log=lambda sentence: None)
    assert len(timings) == 2 * len(SHAPES)
    fastest = Execution.always("dense" if allow_dense else "unpacked")
    for load in (load_pruned, AutoModelForCausalLM.from_pretrained):
        model = load(folder)
        assert choices_of(model) == {fastest} and choose(timings, allow_dense).keys() == SHAPES
        torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4)


# The command


def test_the_command_prints_a_table_and_writes_the_choice(folder):
    output = armorfact("bench", folder, "--tokens", "4, 1", "--device", "cpu")
    header = row(output, "layer")
    assert [word for word in header if word != "µs"] == [
        *("layer", "tokens", "dense,", "packed,", "unpacked,", "fastest", "x", "dense", "wrappers")
    ]
    for shape in SHAPES:
        name, blocks = shape.split(" in ")
        lines = [line.split() for line in output.splitlines() if line.strip().startswith(f"{shape} ")]
        assert [cells[:4] for cells in lines] == [[name, "in", blocks, tokens] for tokens in ("1", "4")]
        assert all(cells[-3] in ("dense", "packed", "unpacked") and float(cells[-2]) > 0 for cells in lines)
        assert sum(line.startswith(f"{shape}: ") and "; chosen: " in line for line in output.splitlines()) == 1
    written = read_measured(folder, CPU, torch.float32)
    assert written.keys() == SHAPES
    assert {layer.execution for layer in layers(load_pruned(folder))} == set(written.values())


def test_the_command_shows_whole_models(folder):
    dense = folder.parent / "model"
    report = json.loads((folder / "report.json").read_text())
    shutil.copytree(report["model"]["name"], dense)
    report["model"]["name"] = str(dense)
    (folder / "report.json").write_text(json.dumps(report))
    options = ("--tokens", 1, "--end-to-end", "--prompt", 8, "--new", 3, "--device", "cpu")
    output = armorfact("bench", folder, *options)
    rows = [line.split() for line in output.splitlines() if line.strip().startswith((f"{dense} ", f"{folder} "))]
    assert [cells[0] for cells in rows] == [str(dense), str(folder)]
    assert rows[0][2::2] == ["(1.00)", "(1.00)", "(1.000)", "(1.000)"]
    figures = [float(cell.replace(",", "")) for cells in rows for cell in cells[1::2]]
    assert min(figures) > 0 and len(figures) == 8
    ratio = float(rows[1][6].strip("()"))
    assert 0.5 < ratio < 1  # the pruned weights are smaller, the embedding is not


def test_the_prompt_is_read_by_kernels_that_are_compiled_already(folder, monkeypatch):
    read, run = [], models._run
    monkeypatch.setattr(
        models, "_run", lambda model, tokens, new: read.append(tokens.shape[1]) or run(model, tokens, new)
    )
    models.throughput(str(folder), 30, 2, device="cpu")
    assert read == [30] * (2 + models.READINGS)


def test_a_model_that_is_another_or_reads_too_little_is_told(folder):
    with pytest.raises(ValueError, match="is not the model that was pruned"):
        models.throughput(str(folder), 8, 2, device="cpu", fingerprint="another")
    for new in (64, 100):
        with pytest.raises(ValueError, match="would be written: write fewer"):
            models.throughput(str(folder), 8, new, device="cpu")


def test_what_would_fail_is_told_before_the_layers_are_timed(folder, monkeypatch):
    monkeypatch.setattr(bench, "time_side_by_side", None)
    assert "they are for --end-to-end" in armorfact("bench", folder, "--prompt", 8, code=1)
    (folder / "report.json").unlink()
    output = armorfact("bench", folder, "--end-to-end", code=1)
    assert output.startswith("Error: ") and "report.json" in output and not (folder / FILE).exists()


@pytest.mark.parametrize("tokens", ["0", "1,0", "x", "", "1,,2", "-1", "1.5", "1;2"])
def test_wrong_numbers_of_tokens_are_explained(tokens, folder):
    output = armorfact("bench", folder, "--tokens", tokens, code=1)
    assert output.startswith("Error: ValueError: --tokens expects numbers of at least 1 separated by commas")
    assert repr(tokens) in output and not (folder / FILE).exists()


def test_a_folder_that_is_not_pruned_is_named(pruned, tmp_path):
    for wrong in (pruned.parent / "model", tmp_path, tmp_path / "nothing"):
        output = armorfact("bench", wrong, code=1)
        assert output.startswith("Error: ") and str(wrong) in output and not (wrong / FILE).exists()
