"""The command that trains LoRA on a pruned folder, from end to end on a tiny one, with the real PEFT and TRL."""

from __future__ import annotations

import re

import pytest
import torch

from armorfact_hf import load_pruned
from tests.hf.models import random_text, random_tokens
from tests.hf.runs.folders import OURS, prune, saved

peft = pytest.importorskip("peft", reason="needs 'armorfact[peft]'")
pytest.importorskip("trl")
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*gradient_checkpointing` is deprecated:FutureWarning"
)  # TRL's and PEFT's


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("ARMORFACT_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def test_the_command_trains_measures_and_saves(tmp_path, capsys):
    from benchmarks.finetune import main

    text, pruned, out = tmp_path / "text.txt", tmp_path / "pruned", tmp_path / "adapter"
    text.write_text(random_text(400))
    prune(saved("llama", tmp_path / "dense"), pruned, text, OURS)
    given = ["--calibration", text, "--text", text, "--windows", 4, "--eval-length", 24, "--length", 24]
    main([str(part) for part in (pruned, "--out", out, *given, "--steps", 20, "--rank", 4, "--rate", 1e-2)])
    printed = capsys.readouterr().out
    assert "LoRA of rank 4 (" in printed and "20 windows of 24 tokens" in printed
    before, after = re.search(r"perplexity on text.txt: ([\d.]+) before, ([\d.]+) after", printed).groups()
    assert float(after) < float(before)
    base = load_pruned(pruned)
    with torch.no_grad():
        plain = base(random_tokens()).logits
        tuned = peft.PeftModel.from_pretrained(base, out)(random_tokens()).logits
    assert not torch.equal(plain, tuned)
