"""Tiny random models of several families, tokens for them. No network."""

from __future__ import annotations

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn

VOCABULARY = 96
WIDTH, INNER, HEADS, BLOCKS = 32, 64, 4, 3

COMMON = {"vocab_size": VOCABULARY, "max_position_embeddings": 64}
SIZES = {
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": HEADS,
}
GROUPED = {**SIZES, "num_key_value_heads": 2}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

FAMILIES = {
    "llama": ("LlamaConfig", {**GROUPED, "tie_word_embeddings": True}),
    "qwen2": ("Qwen2Config", GROUPED),
    "qwen3": ("Qwen3Config", {**GROUPED, "head_dim": 8}),
    "gemma3": ("Gemma3TextConfig", {**GROUPED, "head_dim": 8, "sliding_window": 8, "layer_types": None}),
    "mistral": ("MistralConfig", {**GROUPED, "sliding_window": 8}),
    "phi": ("PhiConfig", SIZES),
    "opt": (
        "OPTConfig",
        {
            "hidden_size": WIDTH,
            "ffn_dim": INNER,
            "num_hidden_layers": BLOCKS,
            "num_attention_heads": HEADS,
            "word_embed_proj_dim": WIDTH,
        },
    ),
    "gpt2": ("GPT2Config", {"n_embd": WIDTH, "n_layer": BLOCKS, "n_head": HEADS, "n_positions": 64}),
    "falcon": (
        "FalconConfig",
        {"hidden_size": WIDTH, "num_hidden_layers": BLOCKS, "num_attention_heads": HEADS, "alibi": False},
    ),
}

ROUTED = {"num_experts_per_tok": 2}
EXPERTS = {
    "mixtral": ("MixtralConfig", {**GROUPED, **ROUTED, "num_local_experts": 4}),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {**GROUPED, **ROUTED, "head_dim": 8, "moe_intermediate_size": 16, "num_experts": 4},
    ),
    "deepseek_v3": (
        "DeepseekV3Config",
        {
            **SIZES,
            **ROUTED,
            **{"num_key_value_heads": HEADS, "moe_intermediate_size": 16, "n_routed_experts": 4, "n_shared_experts": 1},
            **{"n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 16, "kv_lora_rank": 16},
            **{"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8},
        },
    ),
    "gpt_oss": (
        "GptOssConfig",
        {**GROUPED, **ROUTED, "head_dim": 8, "num_local_experts": 4, "sliding_window": 8, "rope_parameters": None},
    ),
}


RENAMED = {
    "gemma3_vision": (
        "Gemma3Config",
        {
            "text_config": {**COMMON, **GROUPED, "head_dim": 8, "sliding_window": 8},
            "vision_config": {
                **{"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
                **{"image_size": 16, "patch_size": 8},
            },
            "mm_tokens_per_image": 4,
        },
    ),
    "nemotron_h": (
        "NemotronHConfig",
        {
            **{"hidden_size": WIDTH, "intermediate_size": INNER, "num_attention_heads": HEADS},
            **{"num_key_value_heads": 2, "head_dim": 8, "layers_block_type": ["attention", "mlp"] * 2},
            **{"mamba_num_heads": 4, "mamba_head_dim": 8, "n_groups": 2, "ssm_state_size": 8},
        },
    ),
}


def tiny_model(family: str, seed: int = 0, dtype: torch.dtype = torch.float32, **changes) -> nn.Module:
    """A random causal language model in evaluation mode."""
    name, values = {**FAMILIES, **EXPERTS, **RENAMED}[family]
    torch.manual_seed(seed)
    config = getattr(transformers, name)(**{**COMMON, **TOKENS, **values, **changes})
    return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def random_tokens(windows: int = 4, length: int = 24, seed: int = 0) -> Tensor:
    """(windows, length) token numbers."""
    return torch.randint(3, VOCABULARY, (windows, length), generator=torch.Generator().manual_seed(seed))


def word_tokenizer(**special) -> transformers.PreTrainedTokenizerFast:
    """One token for each of the words w3, w4, …; <unk> is 0, <s> is 1, </s> is 2."""
    words = ["<unk>", "<s>", "</s>", *(f"w{k}" for k in range(3, VOCABULARY))]
    inner = Tokenizer(models.WordLevel({word: k for k, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"} | special
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **special)


def random_text(words: int, seed: int = 0) -> str:
    """A text of so many words of `word_tokenizer`."""
    numbers = torch.randint(3, VOCABULARY, (words,), generator=torch.Generator().manual_seed(seed))
    return " ".join(f"w{k}" for k in numbers.tolist())
