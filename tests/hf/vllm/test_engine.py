"""Real vLLM on small pruned models: the tokens of transformers, on one rank and on two, and what it refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import armorfact_hf
from armorfact import Pattern
from armorfact_hf.layers.format import LayerFormat
from tests.hf.vllm.folders import changed, expected_tokens, pruned

pytest.importorskip("vllm", reason="vLLM takes an environment of its own: `make test-vllm` makes it and runs this")

ATTENTION = "model.layers.1.self_attn"
ROOTS = [str(parent) for parent in Path(armorfact_hf.__file__).parents[1:3]]


def run(*cases: dict) -> list[dict]:
    """What vLLM makes of each case, in one process of its own."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(ROOTS)}
    command = [sys.executable, "-m", "tests.hf.vllm.engine", json.dumps(cases)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200)
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith(('{"tokens"', '{"error"'))]
    assert len(found) == len(cases), done.stdout + done.stderr
    return [{**case, "log": done.stdout + done.stderr} for case in found]


def _flip(tensors, sha256):
    tensors[f"{ATTENTION}.q_proj.values"].view(-1)[5] *= 2


def _drop_norm(tensors, sha256):
    del tensors["model.norm.weight"]


def _drop_left(tensors, sha256):
    del tensors[f"{ATTENTION}.q_proj.left"]


def _add_bias(tensors, sha256):
    tensors[f"{ATTENTION}.o_proj.bias"] = tensors["model.norm.weight"].clone()
    sha256.clear()


def _drop_bias(tensors, sha256):
    del tensors[f"{ATTENTION}.k_proj.bias"]
    sha256.clear()


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("folders")
    llama = pruned(root / "llama", "llama", ignore=("layers.1.self_attn.k_proj",), tensor_parallel=2)
    qwen = pruned(root / "qwen2", "qwen2", ignore=("layers.0.mlp.up_proj",))
    whole = {
        "llama": llama,
        "qwen2": qwen,
        "gpt2": pruned(root / "gpt2", "gpt2"),
        "falcon": pruned(root / "falcon", "falcon"),
        "head": pruned(root / "head", "llama", head=True, include=("q_proj",)),
        "int8": pruned(root / "int8", "llama", core_dtype="int8", tensor_parallel=2),
        "shot": pruned(root / "shot", "llama", method="wanda", pattern="1:4"),
    }
    damage = {"flip": _flip, "norm": _drop_norm, "left": _drop_left, "bias": _add_bias}
    damaged = {name: changed(llama, root / name, change) for name, change in damage.items()}
    return whole | damaged | {"no bias": changed(qwen, root / "no-bias", _drop_bias)}


@pytest.fixture(scope="module")
def found(folders) -> dict[str, dict]:
    results = run(*({"folder": str(folder), "ranks": 1} for folder in folders.values()))
    return dict(zip(folders, results, strict=True))


def test_the_fused_parts_differ_in_their_blocks(folders):
    config = json.loads((folders["llama"] / "config.json").read_text(encoding="utf-8"))
    blocks = {entry["name"]: entry["block"] for entry in config["quantization_config"]["modules"]}
    assert f"{ATTENTION}.k_proj" not in blocks
    assert blocks[f"{ATTENTION}.q_proj"] != blocks[f"{ATTENTION}.v_proj"]


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2", "int8", "shot"])
def test_tokens_are_those_of_transformers(found, folders, name):
    assert found[name].get("tokens") == expected_tokens(folders[name]), found[name]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("flip", f"tensor {ATTENTION}.q_proj.values is damaged"),
        ("norm", "lacks model.norm.weight"),
        ("left", f"the files lack {ATTENTION}.q_proj.left"),
        ("bias", f"the files hold {ATTENTION}.o_proj.bias"),
        ("no bias", f"the files lack {ATTENTION}.k_proj.bias"),
        ("falcon", "query_key_value: vLLM's model reorders the rows"),
        ("head", "lm_head is pruned, and in vLLM's model it is ParallelLMHead"),
    ],
)
def test_what_cannot_be_served_right_is_refused_at_the_start(found, name, message):
    assert message in found[name].get("error", "no error"), found[name]


@pytest.mark.filterwarnings("ignore")  # of what vLLM imports
def test_what_latent_attention_absorbs_is_refused():
    from vllm.model_executor.layers.linear import ColumnParallelLinear

    from armorfact_hf.vllm.quantization import ArmorfactQuantization

    name = f"{ATTENTION}.kv_b_proj"
    config = ArmorfactQuantization({})
    config.formats, config.stored = {name: LayerFormat(name, (32, 64), Pattern(2, 4), None)}, frozenset()
    with pytest.raises(ValueError, match=rf"{name} is pruned, .* --ignore kv_b_proj"):
        config.get_quant_method(object.__new__(ColumnParallelLinear), name)


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="two ranks take two cores")
def test_two_ranks_write_the_same_tokens(folders):
    [result] = run({"folder": str(folders["llama"]), "ranks": 2})
    assert result.get("tokens") == expected_tokens(folders["llama"]), result


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="two ranks take two cores")
def test_a_cut_through_a_block_stops_the_server(tmp_path):
    folder = pruned(tmp_path / "pruned", "llama", include=("q_proj",), block=128)
    [result] = run({"folder": str(folder), "ranks": 2})
    assert "q_proj: one of 2 ranks holds rows 0 to 64 of 128, which cuts a block of A of 128 rows" in result["log"]
    assert "error" in result and "--tensor-parallel 2" in result["log"]
