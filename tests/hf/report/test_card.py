"""The model card: what the hub reads of it, what a stranger does with it, and that nobody's words are lost."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from huggingface_hub import ModelCard

from armorfact_hf import evaluate_folder, prune_, save_pruned
from armorfact_hf.data.origin import Origin, origin_of
from armorfact_hf.evaluation.measure import Evaluation
from armorfact_hf.observer import Observer
from armorfact_hf.report.card import write_card
from armorfact_hf.report.page import write_report
from armorfact_hf.report.record import Report, TaskRecord
from tests.hf.models import random_tokens, tiny_model, word_tokenizer
from tests.hf.observers import Silent
from tests.hf.report.records import HOSTILE, evaluation
from tests.hf.runs.folders import OURS, QUICK, prune

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("ARMORFACT_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture
def folder(model_folder, text_file, tmp_path):
    (model_folder / "README.md").write_text("---\nlicense: mit\n---\n# A dense model\n")
    prune(model_folder, tmp_path / "pruned", text_file)
    return tmp_path / "pruned"


def retold(folder, **changes):
    report = replace(Report.read(folder), **changes)
    write_report(report, folder)
    write_card(folder)
    return ModelCard.load(folder / "README.md")


def test_its_first_lines_say_what_to_import(folder):
    heading, first = ModelCard.load(folder / "README.md").text.strip().split("\n\n")[:2]
    assert heading == "# model, pruned to 2:4 by armorfact"
    assert first.startswith("**`import armorfact_hf` has to come first.** transformers' plain `from_pretrained` cannot")


def test_its_own_lines_run_the_model(folder, capsys):
    [code] = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), flags=re.DOTALL)
    exec(code.replace("path/to/this/folder", str(folder)).replace("The history of the city", "w5 w6 w7"), {})
    assert "w5 w6 w7" in capsys.readouterr().out


def test_the_hub_reads_base_licence_and_tags(folder):
    data = ModelCard.load(folder / "README.md").data
    assert (data.license, data.library_name, data.pipeline_tag) == ("mit", "transformers", "text-generation")
    assert {"armorfact", "2-4-sparsity"} <= set(data.tags) and data.base_model is None
    model = replace(Report.read(folder).model, origin=Origin("owner/dense-1b", "apache-2.0"))
    card = retold(folder, model=model)
    assert (card.data.base_model, card.data.license) == ("owner/dense-1b", "apache-2.0")
    assert "# dense-1b, pruned" in card.text and "| base model | owner/dense-1b (" in card.text


def test_it_is_written_again_with_what_was_measured(folder, text_file):
    assert "No perplexity has been measured yet" in ModelCard.load(folder / "README.md").text
    report = evaluate_folder(folder, [Evaluation(str(text_file), 2, 24)], observer=Silent())
    [record], card = report.evaluations, ModelCard.load(folder / "README.md")
    found = record.methods[0].perplexity
    assert f"| {record.dense:.3f} | {found:.3f} | {found / record.dense:.3f} |" in card.text
    [result] = card.data.eval_results
    assert (result.dataset_name, result.metric_type, result.metric_value) == ("text.txt", "perplexity", found)
    asked = TaskRecord("piqa", 100, 0.67, 0.6, 0.048), TaskRecord("sciq", 100, 0.5, None, 0.048)
    text = retold(folder, tasks=(*asked, TaskRecord("boolq", 1, 1.0, 0.0, None))).text
    assert "| piqa | 100 | 0.670 | 0.600 | 0.048 |" in text and "sciq" not in text
    assert "| boolq | 1 | 1.000 | 0.000 | |" in text


def test_sizes_settings_and_calibration_are_told(folder, text_file):
    text, report = (folder / "README.md").read_text(), Report.read(folder)
    held = (folder / "model.safetensors").stat().st_size
    assert f"| bytes of the weights | {held:,}; the dense model's {report.model.bytes:,}, ratio " in text
    assert "Calibration: 4 windows of 24 tokens of text.txt." in text and str(text_file.parent) not in text
    assert "method wanda" in text and f"armorfact {report.armorfact_version}" in text


def test_words_that_somebody_added_are_kept(folder, text_file):
    path, said = folder / "README.md", []
    path.write_text(path.read_text().replace("## Run it", "## My own words\n\n## Run it"))
    before = path.read_bytes()
    assert not write_card(folder)
    observer = type("Listening", (Observer,), {"say": lambda self, sentence: said.append(sentence)})()
    evaluate_folder(folder, [Evaluation(str(text_file), 2, 24)], observer=observer)
    assert path.read_bytes() == before
    assert any("was edited by hand: it is left as it is" in sentence for sentence in said)
    path.unlink()
    assert write_card(folder) and "My own words" not in path.read_text()


def test_line_ends_that_a_checkout_changed_are_no_edit(folder):
    path = folder / "README.md"
    text = path.read_bytes()
    path.write_bytes(text.replace(b"\n", b"\r\n"))
    assert write_card(folder) and path.read_bytes() == text


def test_names_that_mean_harm_stay_text(folder):
    record = replace(evaluation(wanda=40.0), text=HOSTILE + "\n| a | b |")
    card = retold(folder, evaluations=(record,))
    [line] = [line for line in card.text.splitlines() if "script" in line]
    assert line.count("|") - line.count(r"\|") == 8 and "<script>" not in line.replace(r"\<", "")
    assert card.data.eval_results[0].dataset_name.startswith("<script>")


def test_a_model_pruned_in_memory_has_a_card_too(tmp_path):
    model = tiny_model("llama")
    prune_(model, random_tokens(), QUICK)
    save_pruned(model, tmp_path / "mine", word_tokenizer())
    card = ModelCard.load(tmp_path / "mine" / "README.md")
    assert "# mine, pruned to 2:4 by armorfact" in card.text and "method wanda" in card.text
    assert card.data.license is None and card.data.eval_results is None
    assert "No perplexity has been measured yet.\n" in card.text  # `armorfact eval` knows no dense model


def test_it_says_what_is_stored_and_what_runs_it(tmp_path):
    found = {}
    for family, config in (("llama", QUICK), ("llama", OURS), ("mixtral", OURS)):
        model = tiny_model(family)
        report = prune_(model, random_tokens(), config)
        save_pruned(model, folder := tmp_path / f"{family}-{config.method}")
        write_card(folder)
        text = found[folder.name] = (folder / "README.md").read_text()
        assert f"\n{len(report.layers)} linear layers " in text
        assert ("wrappers" in text) == (config is OURS)
        assert ("vllm.entrypoints" in text) == (family == "llama")
    assert "vLLM does not run it" in found["mixtral-armorfact"]


@pytest.mark.parametrize("text", ["no metadata", "---\nlicense: [a, b]\n---\n", "---\n: : :\n---\n", "---\n- a\n---\n"])
def test_a_card_of_the_base_that_cannot_be_read_says_nothing(tmp_path, text):
    (tmp_path / "README.md").write_text(text)
    assert origin_of(str(tmp_path)) == Origin()


def test_origins_of_demo_models_and_of_names_on_the_hub():
    assert origin_of("demo:smollm2") == Origin("HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0")
    assert origin_of("owner/name") == Origin("owner/name", None)  # no network here
