"""lm-eval's own command line on a pruned folder, with questions of a local file."""

from __future__ import annotations

import json
import random
import sys

import pytest
import torch

from armorfact_hf import load_pruned
from armorfact_hf.evaluation.lm_eval import main
from tests.hf.models import VOCABULARY
from tests.hf.runs.folders import OURS, prune, saved

pytest.importorskip("lm_eval")
pytestmark = [pytest.mark.usefixtures("own_cache"), pytest.mark.filterwarnings("ignore")]

TASK = """
task: wordy
dataset_path: json
dataset_kwargs: {data_files: {test: "%s"}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{context}}"
doc_to_choice: choices
doc_to_target: gold
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


@pytest.fixture
def own_cache(tmp_path_factory, monkeypatch):
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("ARMORFACT_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", cache / "datasets")


def questions(count=30):
    source = random.Random(0)
    for _ in range(count):
        context, *choices = [f"w{source.randrange(3, VOCABULARY)}" for _ in range(5)]
        yield {"context": context, "choices": choices, "gold": source.randrange(4)}


def test_it_scores_a_pruned_folder_as_the_model_does(tmp_path, text_file, monkeypatch):
    pruned, asked = tmp_path / "pruned", list(questions())
    prune(saved("llama", tmp_path / "dense", initializer_range=0.3), pruned, text_file, OURS)
    (tmp_path / "tasks").mkdir()
    (tmp_path / "asked.jsonl").write_text("\n".join(map(json.dumps, asked)))
    (tmp_path / "tasks" / "wordy.yaml").write_text(TASK % (tmp_path / "asked.jsonl"))
    given = ["--model", "hf", "--model_args", f"pretrained={pruned}", "--tasks", "wordy", "--device", "cpu"]
    given += ["--include_path", str(tmp_path / "tasks"), "--output_path", str(tmp_path / "found.json")]
    monkeypatch.setattr(sys, "argv", ["lm-eval", "run", *given])
    main()
    [written] = tmp_path.rglob("found*.json")
    found = json.loads(written.read_text())["results"]["wordy"]["acc,none"]
    model = load_pruned(pruned)
    right = []
    for question in asked:
        with torch.no_grad():
            scores = model(torch.tensor([[int(question["context"][1:])]])).logits[0, -1]
        likely = [float(scores[int(word[1:])]) for word in question["choices"]]
        right.append(likely.index(max(likely)) == question["gold"])
    assert 0 < sum(right) < len(right) and found == pytest.approx(sum(right) / len(right))
