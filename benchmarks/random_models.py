"""Folders with random models and texts, written without holding a model in memory."""

from __future__ import annotations

import argparse
import json
import zlib
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import split_torch_state_dict_into_shards
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers.core_model_loading import revert_weight_conversion

from armorfact_hf.checkpoint.shard_file import write_shard
from armorfact_hf.checkpoint.shards import INDEX
from armorfact_hf.model.structure import decoder_blocks

VOCABULARY = 2048
SHARD = "1GB"
NOISE = 2**22 - 3  # a prime: drawn once and repeated, so that no two rows of a weight are alike and writing is fast


def config_of(settings: argparse.Namespace) -> transformers.PreTrainedConfig:
    """A Llama or a Mixtral with as many blocks as the size asks for."""
    hidden, inner, shared = settings.hidden, settings.inner, settings.kv_heads / settings.heads
    experts = max(settings.experts, 1)
    block = 2 * (2 * hidden * hidden + 2 * int(shared * hidden) * hidden + 3 * experts * hidden * inner)
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": max(1, -int(-settings.gb * 1e9 // block)),
        "num_attention_heads": settings.heads,
        "num_key_value_heads": settings.kv_heads,
        "max_position_embeddings": 2048,
        "pad_token_id": 0,
        "dtype": "bfloat16",
    }
    if settings.experts:
        return transformers.MixtralConfig(num_local_experts=experts, **sizes)
    return transformers.LlamaConfig(**sizes)


def write_model(folder: Path, config: transformers.PreTrainedConfig) -> dict[str, int]:
    """Write random weights, one tensor in memory at a time; the bytes of the model and of a decoder block."""
    with torch.device("meta"):
        model: Any = transformers.AutoModelForCausalLM.from_config(config)
    shapes = revert_weight_conversion(model, model.state_dict())  # as checkpoints have them
    split = split_torch_state_dict_into_shards(
        shapes, filename_pattern="model{suffix}.safetensors", max_shard_size=SHARD
    )
    noise = torch.randn(NOISE, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)

    def drawn(name: str) -> torch.Tensor:
        like = shapes[name]
        if like.ndim == 1:
            return torch.ones(like.shape, dtype=like.dtype)
        shifted = noise.roll(zlib.crc32(name.encode()) % NOISE)
        whole = shifted.repeat(like.numel() // NOISE + 1)[: like.numel()]
        return whole.reshape(like.shape).mul_(like.shape[1] ** -0.5)

    for file, names in split.filename_to_tensors.items():
        write_shard(folder / file, {name: shapes[name] for name in names}, drawn)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index), encoding="utf-8")
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    _tokenizer().save_pretrained(folder)
    blocks = decoder_blocks(model)[1]
    return {
        "model": sum(parameter.nbytes for parameter in model.parameters()),
        "block": max(sum(parameter.nbytes for parameter in block.parameters()) for block in blocks),
        "blocks": len(blocks),
    }


def _tokenizer() -> transformers.PreTrainedTokenizerFast:
    words = {"<unk>": 0, **{f"w{k}": k for k in range(1, VOCABULARY)}}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")


def write_text(path: Path, words: int) -> None:
    """A text of so many random words."""
    numbers = torch.randint(1, VOCABULARY, (words,), generator=torch.Generator().manual_seed(1))
    path.write_text(" ".join(f"w{k}" for k in numbers.tolist()), encoding="utf-8")
