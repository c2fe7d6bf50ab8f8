"""What cannot be pruned is told in a sentence before any work."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

from armorfact_hf.layers.linear import FactorizedLinear
from armorfact_hf.pruning.config import PruneConfig
from armorfact_hf.pruning.plan import make_plan
from armorfact_hf.pruning.prune import prune_
from tests.hf.models import BLOCKS, TOKENS, VOCABULARY, random_tokens, tiny_model

QUICK = PruneConfig(method="wanda", baselines=())


def t5() -> nn.Module:
    sizes = {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, **TOKENS, decoder_start_token_id=0))


def vit() -> nn.Module:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return transformers.ViTForImageClassification(transformers.ViTConfig(**sizes, image_size=16, patch_size=8))


def on_meta() -> nn.Module:
    with torch.device("meta"):
        return tiny_model("llama")


def mixed() -> nn.Module:
    model = tiny_model("llama")
    model.model.layers[1].bfloat16()
    return model


def one_block_twice() -> nn.Module:
    model = tiny_model("llama")
    model.model.layers[2] = model.model.layers[1]
    return model


def holding_nan(name: str):
    model = tiny_model("llama", tie_word_embeddings=False)
    with torch.no_grad():
        model.get_parameter(name)[-1, 0] = torch.nan
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (t5, "expected a decoder-only causal language model .*, got a T5ForConditionalGeneration"),
        (vit, "expected a decoder-only causal language model .*, got a ViTForImageClassification"),
        (lambda: nn.Sequential(nn.Linear(4, 4)), "expected a decoder-only causal language model .*, got a Sequential"),
        (on_meta, r"model\.embed_tokens\.weight holds no numbers .*meta device.*: load the model into memory"),
        (mixed, r"LlamaForCausalLM cannot be run on tokens \(RuntimeError: .*fit each other in dtype"),
        (one_block_twice, "has 3 decoder blocks and calls them in the order 1, 2, 3, 2, 3: expected each once"),
        (lambda: holding_nan("lm_head.weight"), r"lm_head\.weight holds NaN or infinite values"),
        (lambda: holding_nan("model.embed_tokens.weight"), r"embed_tokens\.weight holds NaN or infinite values"),
        (lambda: holding_nan("model.layers.2.mlp.up_proj.weight"), r"layers\.2\.mlp\.up_proj\.weight holds NaN"),
    ],
    ids=["T5", "ViT", "no language", "meta", "mixed dtypes", "block twice", "NaN head", "NaN embedding", "NaN layer"],
)
@pytest.mark.parametrize("act", [make_plan, prune_])
def test_a_model_that_cannot_be_pruned_is_told_before_any_work(act, make, message):
    model = make()
    with pytest.raises(ValueError, match=message):
        act(model, random_tokens(), QUICK)
    assert not any(isinstance(module, FactorizedLinear) for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_windows_longer_than_the_model_takes_are_told(family):
    with pytest.raises(ValueError, match="windows of 65 tokens, and the model is made for at most 64: cut shorter"):
        prune_(tiny_model(family), random_tokens(length=65), QUICK)


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        ([[3, 4, 5], [3, 4]], "got list: .*armorfact_hf.windows"),
        ("some text", "got str: "),
        (None, "got NoneType: "),
        (torch.ones(2, 3, dtype=torch.bool), r"got shape \(2, 3\) of torch.bool"),
        (torch.ones(2, 3, dtype=torch.complex64), r"got shape \(2, 3\) of torch.complex64"),
    ],
)
def test_what_is_no_matrix_of_tokens_is_told(calibration, message):
    with pytest.raises(
        ValueError, match=r"calibration must be a \(windows, length\) matrix of token numbers, " + message
    ):
        prune_(tiny_model("llama"), calibration, QUICK)


def test_a_layer_in_another_dtype_than_the_model_stays_dense():
    model = tiny_model("llama")
    layer = model.model.layers[1].mlp
    layer.down_proj.double()
    layer.forward = lambda x: layer.down_proj((layer.act_fn(layer.gate_proj(x)) * layer.up_proj(x)).double()).float()
    report = prune_(model, random_tokens(), QUICK)
    assert len(report.layers) == 7 * BLOCKS - 1
    [dense] = report.dense_layers
    assert dense.name == "model.layers.1.mlp.down_proj"
    assert dense.reason.startswith("its weight is in float64, the model in float32")


class Mixture(nn.Module):
    """Each token goes to one of two experts."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.router = nn.Linear(width, 2, bias=False)
        self.experts = nn.ModuleList([nn.Linear(width, width), nn.Linear(width, width)])

    def forward(self, x):
        flat = x.flatten(0, -2)
        chosen, y = self.router(flat).argmax(-1), torch.zeros_like(flat)
        for k, expert in enumerate(self.experts):
            y[chosen == k] = expert(flat[chosen == k])
        return y.view_as(x)


def routed_model() -> nn.Module:
    model = tiny_model("llama")
    for layer in model.model.layers:
        layer.mlp = Mixture(32)
    return model


def test_routed_experts_are_refused_for_the_output_target_and_pruned_otherwise():
    config = PruneConfig(sweeps=1, baselines=(), target="output")
    with pytest.raises(ValueError, match=r"experts\.\d is given \d+ of 24 tokens: .*take target='weight', or leave"):
        prune_(routed_model(), random_tokens(), config)
    report = prune_(routed_model(), random_tokens(), PruneConfig(sweeps=1, baselines=()))
    counts = {layer.name.rpartition("layers.")[2]: layer.tokens for layer in report.layers}
    assert counts["0.mlp.experts.0"] + counts["0.mlp.experts.1"] == counts["0.self_attn.q_proj"] == 4 * 24
    prune_(routed_model(), random_tokens(), PruneConfig(**{**config.to_dict(), "ignore": ("re:.*experts",)}))
