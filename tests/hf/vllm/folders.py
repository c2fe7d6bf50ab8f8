"""Small pruned models that vLLM can serve on a CPU, whose attention takes heads of 32 and more."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from armorfact_hf.checkpoint.folder import save_pruned
from armorfact_hf.pruning.config import PruneConfig
from armorfact_hf.pruning.prune import prune_
from tests.hf.models import random_tokens, tiny_model, word_tokenizer
from tests.hf.vllm.engine import NEW_TOKENS, PROMPTS

LLAMA = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
SIZES = {
    "llama": {**LLAMA, "tie_word_embeddings": False},
    "qwen2": LLAMA,
    "gpt2": {"n_embd": 128},
    "falcon": {"hidden_size": 128},
}


def pruned(folder: Path, family: str, **settings) -> Path:
    """A folder with a pruned model whose tokens differ from each other, and a tokenizer."""
    model = tiny_model(family, initializer_range=0.15, **SIZES[family])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    quick = {} if "method" in settings else {"sweeps": 1, "refine": None}
    prune_(model, random_tokens(), PruneConfig(**quick, **settings, baselines=()))
    save_pruned(model, folder, word_tokenizer())
    return folder


def expected_tokens(folder: Path) -> list[list[int]]:
    """What transformers writes greedily after each of the engine's prompts."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    found = [model.generate(torch.tensor([prompt]), max_new_tokens=NEW_TOKENS, do_sample=False) for prompt in PROMPTS]
    return [tokens[0, len(prompt) :].tolist() for tokens, prompt in zip(found, PROMPTS, strict=True)]


def changed(folder: Path, out: Path, change) -> Path:
    """A copy of a folder whose tensors, and dictionary of digests, were handed to ``change``."""
    out.mkdir()
    for path in folder.iterdir():
        (out / path.name).write_bytes(path.read_bytes())
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    tensors = load_file(out / "model.safetensors")
    change(tensors, config["quantization_config"]["sha256"])
    (out / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    return out
