"""Experts are timed beside the dense ones."""

from __future__ import annotations

import torch

from armorfact_hf.bench import experts, timing
from armorfact_hf.bench.experts import seconds_by_form, time_experts
from armorfact_hf.bench.layers import bench_folder, choose
from armorfact_hf.checkpoint.folder import save_pruned
from armorfact_hf.cli.tables import crossovers
from armorfact_hf.pruning.config import PruneConfig
from armorfact_hf.pruning.prune import prune_
from benchmarks import expert_speed
from benchmarks.expert_speed import random_experts
from tests.hf.models import BLOCKS, random_tokens, tiny_model, word_tokenizer


def test_each_kind_of_experts_at_each_number_of_tokens(monkeypatch):
    monkeypatch.setattr(timing, "SECONDS", 0.0)
    model = tiny_model("gpt_oss", dtype=torch.bfloat16)
    prune_(model, random_tokens(), PruneConfig(method="magnitude", baselines=()))
    found = time_experts(model, [4, 1, 4])
    assert [(x.shape, x.tokens, x.layers) for x in found] == [
        ("2 of 4 experts, 64x32", 1, BLOCKS),
        ("2 of 4 experts, 64x32", 4, BLOCKS),
    ]
    assert all(set(x.seconds) == {"dense", "experts"} and x.dense == x.seconds["dense"] > 0 for x in found)
    assert choose(found) == {}
    [sentence] = crossovers(found, {})
    assert sentence.startswith("2 of 4 experts, 64x32: ") and "chosen" not in sentence


def test_a_folder_whose_experts_alone_are_pruned_is_measured(monkeypatch, tmp_path):
    monkeypatch.setattr(timing, "SECONDS", 0.0)
    model = tiny_model("mixtral")
    prune_(model, random_tokens(), PruneConfig(method="magnitude", baselines=(), include=("re:.*experts.*",)))
    save_pruned(model, tmp_path / "out")
    word_tokenizer().save_pretrained(tmp_path / "out")
    found = bench_folder(tmp_path / "out", [1], device="cpu", log=lambda _: None)
    assert found and all("experts" in each.shape for each in found)


def test_every_way_to_run_the_dense_experts(monkeypatch):
    monkeypatch.setattr(timing, "SECONDS", 0.0)
    made = random_experts(4, 2, 16, 8, 4, torch.float32)
    assert set(seconds_by_form([made], 3)) == {"experts", "eager", "grouped_mm", "batched_mm"}
    monkeypatch.setattr(experts, "DENSE_BYTES", 3 * 16 * 8 * 4 * 6 - 1)  # copies for three tokens, two experts each
    assert set(seconds_by_form([made], 3)) == {"experts", "eager", "grouped_mm"}


def test_the_table_names_the_fastest(capsys, monkeypatch):
    monkeypatch.setattr(timing, "SECONDS", 0.0)
    monkeypatch.setattr(
        "sys.argv",
        ["x", "--experts", "4", "--top", "2", "--width", "16", "--inner", "8", "--block", "0", "--tokens", "1", "3"],
    )
    expert_speed.main()
    assert [line.split(" | ")[:2] for line in capsys.readouterr().out.splitlines()[2:]] == [
        ["| 2 of 4", "1"],
        ["| 2 of 4", "3"],
    ]
    found = expert_speed.row(4, 2, 1, {"experts": 2e-6, "eager": 3e-6, "grouped_mm": 5e-6})
    assert found == "| 2 of 4 | 1 | 3 | eager | 2 | 1.50 |"


def test_a_model_without_experts_has_none():
    assert time_experts(tiny_model("llama"), [1]) == []
