"""The benchmark of streamed runs: the model it makes, and its table."""

from __future__ import annotations

import io
import subprocess
import sys
from contextlib import redirect_stdout

import pytest
import torch
import transformers

from benchmarks import streamed

SMALL = ["--gb", "0.0001", "--hidden", "64", "--inner", "128", "--heads", "4", "--kv-heads", "2", "--length", "16"]


def test_the_model_has_the_size_that_was_asked_for(tmp_path):
    sizes = streamed.write_model(tmp_path, streamed.config_of(streamed.arguments().parse_args(SMALL)))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    held = sum(parameter.nbytes for parameter in model.parameters())
    assert held == sizes["model"] and sizes["blocks"] * sizes["block"] >= 100_000 and model.dtype == torch.bfloat16
    weight = model.model.layers[0].mlp.up_proj.weight
    assert len(weight.unique(dim=0)) == len(weight)
    assert weight.float().std().item() * 8 > 0.9


@pytest.mark.parametrize("experts", [[], ["--experts", "4"]])
def test_the_table_and_equal_tensors(experts, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("ARMORFACT_CACHE", str(tmp_path))

    def run(command, **_):
        with redirect_stdout(printed := io.StringIO()):
            streamed.measured_run(streamed.arguments().parse_args(command[3:]))
        return subprocess.CompletedProcess(command, 0, printed.getvalue())

    monkeypatch.setattr(streamed.subprocess, "run", run)
    monkeypatch.setattr(sys, "argv", ["streamed", *SMALL, *experts, "--compare"])
    streamed.main()
    said = capsys.readouterr().out
    assert "| from disk |" in said and "| in memory |" in said and "tensors: equal" in said
