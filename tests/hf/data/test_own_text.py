"""Text that a model writes itself: drawn by its probabilities, enough of it, the same again, or refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from armorfact_hf.data import own_text as writing
from armorfact_hf.data.calibration import Calibration
from armorfact_hf.data.load_model import Loaded, load_model, open_model
from armorfact_hf.data.own_text import own_text, write_text
from armorfact_hf.data.wheels import cache_folder
from armorfact_hf.pruning.config import PruneConfig
from armorfact_hf.pruning.prune import prune_
from armorfact_hf.runs import load_to_prune as choosing
from armorfact_hf.runs.load_to_prune import job_of, load_to_prune
from armorfact_hf.runs.recover import recover_to_folder
from armorfact_hf.runs.teach import teach_to_folder
from armorfact_hf.runs.write import write_to_file
from tests.hf.models import random_tokens, tiny_model, word_tokenizer
from tests.hf.observers import Silent

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    monkeypatch.setattr(writing, "LONGEST", 24)
    monkeypatch.setattr(writing, "ROWS", 8)


@pytest.fixture
def tokenizer():
    return word_tokenizer()


def silent(sentence: str) -> None:
    """Where sentences go."""


def count(text: str, tokenizer) -> int:
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "qwen2"])
def test_as_many_tokens_as_are_asked_for_and_the_same_text_again(family, tokenizer):
    model = tiny_model(family).eval()
    state = torch.random.get_rng_state()
    first, again, other = (write_text(model, tokenizer, 300, seed) for seed in (0, 0, 1))
    assert first == again != other
    assert count(first, tokenizer) >= 300
    assert torch.equal(torch.random.get_rng_state(), state)


def test_words_are_drawn_by_the_models_own_probabilities(tokenizer):
    """One step, from the token that begins a document: how often each word comes is how likely it is."""
    model = tiny_model("llama", initializer_range=0.5).eval()
    with torch.no_grad():
        likely = model(torch.tensor([[tokenizer.bos_token_id or model.config.bos_token_id]])).logits[0, 0].softmax(-1)
    generator = torch.Generator().manual_seed(0)
    drawn = writing._draw(likely.log().expand(20_000, -1), generator).flatten()
    found = torch.bincount(drawn, minlength=len(likely)) / len(drawn)
    error = (likely * (1 - likely) / len(drawn)).sqrt()
    assert ((found - likely).abs() <= 5 * error + 1e-4).all()


def test_documents_end_at_marks_and_what_the_model_has_read_counts(tokenizer, monkeypatch):
    """The text is that of drawing every word anew from all those before it in its row."""
    model = tiny_model("llama", initializer_range=0.5).eval()
    marks = writing._marks(model, tokenizer)
    found = writing._drawn(model, marks, 3, 24, torch.Generator().manual_seed(5), lambda step: None)
    generator, rows = torch.Generator().manual_seed(5), torch.full((3, 1), marks[0])
    with torch.no_grad():
        for _ in range(24):
            rows = torch.cat([rows, writing._draw(model(rows).logits[:, -1], generator)], 1)
    wanted = []
    for row in rows[:, 1:].tolist():
        document = []
        for token in [*row, marks[0]]:
            if token in marks:
                wanted.append(document)
                document = []
            else:
                document.append(token)
    assert found == wanted


def test_it_is_kept_for_the_next_time_and_by_model(tokenizer, monkeypatch):
    first, other = (Loaded("one", tiny_model("llama", seed=seed).eval(), tokenizer) for seed in (0, 1))
    text = own_text(first, 100, silent)
    assert own_text(other, 100, silent) != text and len(list((cache_folder() / "written").iterdir())) == 2
    monkeypatch.setattr(writing, "write_text", None)
    assert own_text(first, 100, silent) == text
    with pytest.raises(TypeError):
        own_text(first, 101, silent)
    first.model.generation_config.eos_token_id = 5  # other documents
    with pytest.raises(TypeError):
        own_text(first, 100, silent)


def test_line_ends_are_those_that_a_file_gives_back(tokenizer, monkeypatch):
    class Old:
        def __getattr__(self, name):
            return getattr(tokenizer, name)

        def __call__(self, *texts, **more):
            return tokenizer(*texts, **more)

        def decode(self, *tokens, **more):
            return f"a\r\nb\rc {tokenizer.decode(*tokens, **more)}"

    loaded = Loaded("one", tiny_model("llama").eval(), Old())
    first = own_text(loaded, 100, silent)
    assert "\r" not in first and own_text(loaded, 100, silent) == first


def test_what_rows_keep_in_memory_is_bounded(tokenizer, monkeypatch):
    model = tiny_model("llama").eval()
    monkeypatch.setattr(writing, "CACHE_BYTES", 3 * 2 * 24 * 3 * 32 * 4)  # of three rows: layers, width, float32
    rows, steps = [], []
    drawn = writing._drawn
    monkeypatch.setattr(writing, "_drawn", lambda *given: rows.append(given[2]) or drawn(*given))
    text = write_text(model, tokenizer, 300, progress=lambda done, total: steps.append((done, total)))
    assert count(text, tokenizer) >= 300 and set(rows) == {3}
    assert [done for done, _ in steps] == list(range(24 * len(rows))) and steps[0][1] == 24 * 5
    assert all(done < total for done, total in steps)


def test_a_model_without_a_cache_is_told(tokenizer):
    config = transformers.OpenAIGPTConfig(vocab_size=96, n_positions=64, n_embd=32, n_layer=2, n_head=4)
    with pytest.raises(ValueError, match="OpenAIGPTLMHeadModel keeps no cache to write by: calibrate it on a text"):
        write_text(transformers.OpenAIGPTLMHeadModel(config).eval(), tokenizer, 10)


def test_a_model_that_writes_is_loaded_into_memory(model_folder, monkeypatch):
    """However large it is: from disk it could not write."""
    monkeypatch.setattr(choosing, "available", lambda device: 1)
    found = load_to_prune(str(model_folder), None, Calibration("self", 2, 24), observer=Silent())
    assert found.weights is None
    loaded = open_model(str(model_folder), log=silent)
    with pytest.raises(ValueError, match="leave out --stream"):
        Calibration("self", 2, 24).tokens(loaded, silent)
    Calibration("self", 2, 24).tokens(found, silent)
    assert Calibration("self", 2, 24).tokens(loaded, silent).shape == (2, 24)  # what is in the cache needs no writing


def test_whoever_watches_a_run_sees_it_write(model_folder):
    class Watching(Silent):
        def step(self, step):
            seen.append(step)

    seen = []
    loaded = load_to_prune(str(model_folder), None, Calibration("self", 2, 24), observer=Watching())
    job_of(loaded, None, Calibration("self", 2, 24), Watching())
    assert seen and {step.doing for step in seen} == {"writing text"} and seen[0].done == 0 < seen[0].total


@pytest.mark.parametrize("run", [recover_to_folder, teach_to_folder])
def test_a_recovery_reads_its_text_from_a_file(run, tmp_path):
    with pytest.raises(ValueError, match="'self' is for `armorfact prune`"):
        run(tmp_path / "no folder", tmp_path / "out", calibration=Calibration("self", 4, 24))


def test_it_shares_the_windows_with_other_texts(tokenizer, text_file):
    loaded = Loaded("one", tiny_model("llama").eval(), tokenizer)
    tokens = Calibration([str(text_file), "self"], 5, 24).tokens(loaded, silent)
    assert tokens.shape == (5, 24)
    own = tokenizer(own_text(loaded, 3 * 24, silent), add_special_tokens=False)["input_ids"]
    assert tokens[2].tolist() == own[:24]
    with pytest.raises(ValueError, match=r"'self' has no end: say how many windows"):
        Calibration("self", None, 24).tokens(loaded, silent)


def test_a_model_on_disk_and_a_pruned_one_are_told_the_way_out(model_folder, tokenizer):
    with pytest.raises(ValueError, match=r"one decoder block at a time, .* `armorfact write`"):
        own_text(open_model(str(model_folder), log=silent), 100, silent)
    model = tiny_model("llama")
    prune_(model, random_tokens(), PruneConfig(method="wanda", baselines=()))
    with pytest.raises(ValueError, match="is pruned: let `armorfact write` write the dense model's text"):
        own_text(Loaded("pruned", model, tokenizer), 100, silent)


def test_a_model_that_writes_nothing_is_told(tokenizer):
    model = tiny_model("llama").eval()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    model.generation_config.eos_token_id = list(range(model.config.vocab_size))
    with pytest.raises(ValueError, match="ends every document before a word"):
        write_text(model, tokenizer, 10)
    model.config.bos_token_id = model.generation_config = None
    tokenizer.bos_token = tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no token that begins or ends a text"):
        write_text(model, tokenizer, 10)


def test_a_file_is_written_once(model_folder, tmp_path):
    out, steps = tmp_path / "made" / "own.txt", []
    observer = Silent()
    observer.step = steps.append
    write_to_file(str(model_folder), out, 50, observer=observer)
    loaded = load_model(str(model_folder), log=silent)
    assert out.read_text() == write_text(loaded.model, loaded.tokenizer, 50)
    assert steps[0].done == 0 and steps[-1].done == 23 and steps[-1].total == 24
    assert [path.name for path in Path(out.parent).iterdir()] == ["own.txt"]
    with pytest.raises(FileExistsError, match="exists already"):
        write_to_file(str(model_folder), out, 50, observer=observer)
    with pytest.raises(ValueError, match="one token of text or more, got 0"):
        write_to_file(str(model_folder), tmp_path / "other.txt", 0, observer=observer)
