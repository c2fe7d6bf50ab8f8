"""Two decoder blocks of a real model, where its package has been fetched before (`make demo` does)."""

from __future__ import annotations

import pytest
import torch

from armorfact_hf.checkpoint.folder import load_pruned, save_pruned
from armorfact_hf.data import tokens as cutting
from armorfact_hf.data.load_model import load_model
from armorfact_hf.data.texts import calibration_source, evaluation_source
from armorfact_hf.data.wheels import cache_folder
from armorfact_hf.evaluation.perplexity import evaluate_perplexity
from armorfact_hf.pruning.config import PruneConfig
from armorfact_hf.pruning.prune import prune_

FETCHED = (cache_folder() / "models" / "smollm2").is_dir() and (cache_folder() / "text" / "gensim-enwiki.json").exists()
OURS = PruneConfig(include=("re:model\\.layers\\.(10|11)\\.",), sweeps=5, baselines=())


@pytest.mark.slow
@pytest.mark.skipif(not FETCHED, reason="SmolLM2 has not been fetched: `make demo` fetches it")
def test_smollm2_loses_less_than_by_sparsegpt(tmp_path):
    perplexity = {}
    for method in ("dense", "sparsegpt", "armorfact"):
        loaded = load_model("demo:smollm2", "bfloat16", "cpu")
        model, tokenizer = loaded.model, loaded.tokenizer
        tokens = cutting.windows(
            cutting.tokenize(calibration_source("demo:gensim-enwiki").content[:20_000], tokenizer), 512, 4
        )
        if method != "dense":
            report = prune_(model, tokens, OURS if method == "armorfact" else OURS.in_one_shot(method))
            assert len(report.layers) == 14
        held_out = cutting.tokenize(evaluation_source("demo:gensim-enwiki").content[:20_000], tokenizer)
        perplexity[method] = evaluate_perplexity(model, held_out, window=512, max_windows=4).value
    assert perplexity["dense"] < perplexity["armorfact"] < perplexity["sparsegpt"]
    save_pruned(model, tmp_path, tokenizer)
    row = torch.from_numpy(tokens[:1])
    with torch.no_grad():
        assert torch.equal(load_pruned(tmp_path)(input_ids=row).logits, model(input_ids=row).logits)
