"""A pruned model whose files are damaged: a sentence, or the same numbers; never others, never a crash."""

from __future__ import annotations

import random
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from transformers.utils import logging

from armorfact_hf.checkpoint.folder import load_pruned
from armorfact_hf.layers.linear import FactorizedLinear
from armorfact_hf.pruning.config import PruneConfig
from armorfact_hf.pruning.prune import prune_
from tests.adversary.mutations import mutate
from tests.adversary.soak import Soak
from tests.hf.models import tiny_model

TINY = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 16}
ZEROS = ("loaded with other numbers", "ended without a sentence")


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A model of 9 kB in two files with an index."""
    folder = tmp_path_factory.mktemp("mutations") / "whole"
    model = tiny_model("llama", **TINY, num_key_value_heads=1, pad_token_id=0)
    prune_(model, torch.arange(32).reshape(2, 16) % 16, PruneConfig(sweeps=1, block=4, baselines=()))
    model.save_pretrained(folder, max_shard_size="3KB")
    (folder / "generation_config.json").unlink(missing_ok=True)  # says how to write text; of no weight
    return folder


def numbers(folder: Path) -> list[object]:
    """All that a loaded model computes with of what armorfact stores."""
    model = load_pruned(folder)
    pruned = [(name, str(x.pattern), x.block) for name, x in model.named_modules() if isinstance(x, FactorizedLinear)]
    return [pruned, *model.state_dict().items()]


def same(found: list, expected: list) -> bool:
    return found[0] == expected[0] and len(found) == len(expected) and all(
        name == other and x.dtype == y.dtype and torch.equal(x, y)
        for (name, x), (other, y) in zip(found[1:], expected[1:], strict=True)
    )  # fmt: skip


def soak_mutations(soak: Soak, whole: Path, folder: Path) -> None:
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    expected = numbers(whole)
    for seed in soak.seeds():
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(whole, folder)
        how = mutate(folder, random.Random(seed))
        soak.found["mutations"] += 1
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = numbers(folder)
        except (ValueError, OSError) as error:
            outcome = "told in a sentence" if str(error) else "ended without a sentence"
        except Exception as error:
            outcome, how = "ended without a sentence", f"{how}: {error!r}"
        else:
            outcome = "loaded with the same numbers" if same(found, expected) else "loaded with other numbers"
        soak.found[outcome] += 1
        if outcome in ZEROS:
            print(f"seed {seed}: {outcome}: {how}")
    soak.close(*ZEROS)


def test_a_hundred_mutations(whole, tmp_path):
    soak_mutations(Soak("mutations", 100, 60), whole, tmp_path / "damaged")


@pytest.mark.slow
def test_many_mutations(whole, tmp_path):
    soak_mutations(Soak.long("mutations", 100_000), whole, tmp_path / "damaged")
