"""Pruned models through transformers' own doors: `from_pretrained`, `save_pretrained`, `generate`, compile and more."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from transformers import AutoModelForCausalLM, pipeline

from armorfact_hf import Execution, PruneConfig, load_pruned, prune_
from armorfact_hf.checkpoint.description import digests
from armorfact_hf.checkpoint.folder import save_pruned
from armorfact_hf.layers.linear import FactorizedLinear
from tests.hf.models import random_tokens, tiny_model, word_tokenizer

FAST = PruneConfig(sweeps=1, baselines=(), block=8)


def pruned_model(family="llama", dtype=torch.float32, config=FAST, **changes):
    model = tiny_model(family, dtype=dtype, **changes)
    prune_(model, random_tokens(), config)
    return model


def logits(model):
    with torch.no_grad():
        return model(random_tokens(2, seed=1)).logits


def layers(model):
    return [module for module in model.modules() if isinstance(module, FactorizedLinear)]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("native") / "pruned"
    model = pruned_model()
    save_pruned(model, folder, word_tokenizer())
    return model, folder


@pytest.mark.parametrize("how", [{}, {"device_map": "cpu"}, {"device_map": "auto"}, {"low_cpu_mem_usage": True}])
def test_from_pretrained_gives_the_model_that_was_saved(saved, how):
    model, folder = saved
    loaded = AutoModelForCausalLM.from_pretrained(folder, **how)
    assert len(layers(loaded)) == len(layers(model))
    assert torch.equal(logits(loaded), logits(model))
    assert not any(parameter.requires_grad for layer in layers(loaded) for parameter in layer.parameters())


@pytest.mark.parametrize("family", ["qwen2", "gemma3", "gpt2", "opt", "phi"])
def test_other_families(tmp_path, family):
    model = pruned_model(family)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


def test_a_dtype_casts_what_is_floating(saved):
    _, folder = saved
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert {layer.values.dtype for layer in layers(loaded)} == {torch.bfloat16}
    assert {layer.positions.dtype for layer in layers(loaded)} == {torch.uint8}
    assert logits(loaded).isfinite().all()


def test_shards_and_tied_weights(tmp_path):
    model = pruned_model("llama", tie_word_embeddings=True)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))
    missing = max(tmp_path.glob("*.safetensors"))
    missing.unlink()
    with pytest.raises(ValueError, match=missing.name):
        load_pruned(tmp_path)


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "1:4"])
def test_a_round_trip_keeps_every_bit(tmp_path, pattern):
    model = pruned_model(config=PruneConfig(sweeps=1, baselines=(), block=8, pattern=pattern), dtype=torch.bfloat16)
    first, second = tmp_path / "first", tmp_path / "second"
    model.save_pretrained(first)
    AutoModelForCausalLM.from_pretrained(first).save_pretrained(second)
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()
    described = [json.loads((folder / "config.json").read_text())["quantization_config"] for folder in (first, second)]
    assert described[0] == described[1]
    assert described[0]["pattern"] == pattern and described[0]["dtype"] == "bfloat16"


def test_the_files_carry_a_digest_of_every_tensor(saved):
    model, folder = saved
    sha256 = json.loads((folder / "config.json").read_text())["quantization_config"]["sha256"]
    assert sha256 == digests(model.state_dict())
    with safe_open(folder / "model.safetensors", "pt") as stored:
        assert set(stored.keys()) <= set(sha256)
        assert stored.metadata() == {"format": "pt"}  # with a second entry the bytes would differ from save to save


def test_generate_writes_what_the_model_in_memory_writes(saved):
    model, folder = saved
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    tokens = random_tokens(1, 8)
    for changes in ({}, {"num_beams": 2}):
        wanted = model.generate(tokens, max_new_tokens=12, do_sample=False, **changes)
        assert torch.equal(loaded.generate(tokens, max_new_tokens=12, do_sample=False, **changes), wanted)


def test_a_pipeline_takes_the_folder(saved):
    _, folder = saved
    written = pipeline("text-generation", model=str(folder))("w5 w6 w7", max_new_tokens=4, do_sample=False)
    assert written[0]["generated_text"].startswith("w5 w6 w7")


def test_dequantize_gives_an_ordinary_model(saved, tmp_path):
    model, folder = saved
    dense = AutoModelForCausalLM.from_pretrained(folder).dequantize()
    assert not layers(dense)
    torch.testing.assert_close(logits(dense), logits(model), rtol=1e-4, atol=1e-4)
    dense.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())


@pytest.mark.parametrize("strategy", ["packed", "unpacked", "dense"])
@pytest.mark.parametrize("pattern", ["2:4", "4:8"])
def test_compile_sees_one_graph(strategy, pattern):
    torch._dynamo.reset()
    model = pruned_model(config=PruneConfig(sweeps=1, baselines=(), block=8, pattern=pattern))
    execution = Execution.always(strategy if (strategy, pattern) != ("packed", "4:8") else "unpacked")
    for layer in layers(model):
        layer.use_(execution)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for tokens in (random_tokens(1, 8), random_tokens(2, 40)):
        with torch.no_grad():
            torch.testing.assert_close(compiled(tokens).logits, model(tokens).logits)


def test_moving_or_casting_ends_a_choice_that_keeps_a_copy(saved):
    _, folder = saved
    model = load_pruned(folder)
    first = layers(model)[0].use_(Execution.always("dense"))
    assert first.merged is not None and "merged" not in dict(model.state_dict())
    model.to(torch.bfloat16)
    assert first.merged is None and first.execution is None


ORDERS = {
    "armorfact first": "import armorfact_hf\nfrom transformers import AutoModelForCausalLM\n",
    "transformers first": "from transformers import AutoModelForCausalLM, PreTrainedModel\nimport armorfact_hf\n",
    "in the middle": "import transformers\nimport armorfact_hf\nfrom transformers import AutoModelForCausalLM\n",
}


@pytest.mark.parametrize("order", ORDERS)
def test_a_fresh_process_needs_no_other_import(saved, order):
    model, folder = saved
    script = (
        f"{ORDERS[order]}import torch\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(folder)!r})\n"
        "print(model.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=5, do_sample=False).tolist())\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=_environment())
    assert done.returncode == 0, done.stderr
    wanted = model.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=5, do_sample=False)
    assert done.stdout.splitlines()[-1] == str(wanted.tolist())


def test_importing_the_package_does_not_import_transformers():
    script = "import sys, armorfact_hf; print('torch' in sys.modules, 'transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=_environment())
    assert done.stdout.split() == ["False", "False"], done.stderr


def _environment():
    import os

    adapters = Path(__file__).parents[3] / "adapters"
    return {**os.environ, "PYTHONPATH": f"{adapters}{os.pathsep}{adapters.parent}", "OMP_NUM_THREADS": "1"}


def test_a_module_that_the_model_lacks_is_named(saved, tmp_path):
    _, folder = saved
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["modules"][0]["name"] = "model.layers.0.self_attn.no_proj"
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(ValueError, match="no_proj"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_missing_dense_tensor_is_an_error_in_load_pruned(saved, tmp_path):
    from safetensors.torch import load_file, save_file

    _, folder = saved
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(ValueError, match=r"the files lack model\.norm\.weight"):
        load_pruned(tmp_path)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), cut=st.booleans())
def test_a_damaged_file_loads_right_or_not_at_all(saved, tmp_path_factory, place, bit, cut):
    model, folder = saved
    damaged = tmp_path_factory.mktemp("damaged")
    data = bytearray((folder / "model.safetensors").read_bytes())
    at = int(place * len(data))
    if cut:
        del data[at:]
    else:
        data[at] ^= 1 << bit
    (damaged / "model.safetensors").write_bytes(data)
    (damaged / "config.json").write_bytes((folder / "config.json").read_bytes())
    try:
        loaded = load_pruned(damaged)
    except ValueError:  # its messages are tested in test_random_damage.py and beside it
        return
    assert torch.equal(logits(loaded), logits(model))
