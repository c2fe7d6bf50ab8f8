"""A context that is read once gives each choice what lm-eval gives it, who reads it once for each of them."""

import random
from types import SimpleNamespace

import pytest
import torch
from transformers import FalconH1Config, FalconH1ForCausalLM

from tests.hf.models import VOCABULARY, tiny_model, word_tokenizer

pytest.importorskip("lm_eval")

from lm_eval.models.huggingface import HFLM

from armorfact_hf.evaluation import contexts
from armorfact_hf.evaluation.contexts import SharedContexts
from armorfact_hf.model.causal_lm import cache_name

FAMILIES = ("llama", "gemma3", "gpt2", "mixtral", "deepseek_v3")


def scorers(model):
    """lm-eval's own and the one under test, of one model."""
    settings = {"backend": "causal", "tokenizer": word_tokenizer(pad_token="<unk>"), "batch_size": 3}
    return HFLM(model, **settings), SharedContexts(model, **settings)


def questions(count=12, longest=5, seed=0):
    """Requests as lm-eval makes them: contexts of a few lengths, some alike, with choices of one token and of more."""
    source = random.Random(seed)

    def tokens(count):
        return [source.randrange(3, VOCABULARY) for _ in range(count)]

    found = []
    for _ in range(count):
        context = tokens(source.choice([1, 7, 12, 20]))
        choices = [tokens(source.randint(1, longest)) for _ in range(source.randint(1, 4))]
        choices += choices[:1] * source.randint(0, 1)  # the same twice
        found += [(("", ""), context, choice) for choice in choices]
    source.shuffle(found)
    return found


def assert_same(found, expected):
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], abs=1e-4)


@pytest.fixture
def passes(monkeypatch):
    """The shapes of the tokens that `SharedContexts` reads by itself."""
    shapes, forward = [], SharedContexts._forward

    def watched(self, tokens, **how):
        shapes.append(tuple(tokens.shape))
        return forward(self, tokens, **how)

    monkeypatch.setattr(SharedContexts, "_forward", watched)
    return shapes


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("longest", [1, 5])
def test_answers_are_those_of_lm_eval(family, longest, passes):
    theirs, ours = scorers(tiny_model(family))
    requests = questions(longest=longest)
    assert_same(ours._loglikelihood_tokens(requests), theirs._loglikelihood_tokens(requests))
    assert len(passes) > 1


def test_what_greedy_decoding_gives_is_found(passes):
    model = tiny_model("llama")
    theirs, ours = scorers(model)
    context = [5, 6, 7]
    likeliest = model.generate(torch.tensor([context]), max_new_tokens=3, do_sample=False)[0, 3:].tolist()
    other = [likeliest[0], likeliest[1], (likeliest[2] + 1) % VOCABULARY]
    requests = [(("", ""), context, choice) for choice in (likeliest, likeliest[:1], other)]
    found = ours._loglikelihood_tokens(requests)
    assert [greedy for _, greedy in found] == [True, True, False]
    assert_same(found, theirs._loglikelihood_tokens(requests))


def test_each_context_is_read_once(passes):
    _, ours = scorers(tiny_model("llama"))
    context = list(range(3, 33))
    ours._loglikelihood_tokens([(("", ""), context, [choice, 4, 5]) for choice in range(10, 14)])
    assert passes[1:] == [(1, 30), (4, 2)]  # the first asks whether the model keeps keys and values


def test_contexts_of_one_length_are_read_together_as_far_as_there_is_room(passes, monkeypatch):
    _, ours = scorers(tiny_model("llama"))
    requests = [(("", ""), [start, *range(4, 13)], [choice, 5]) for start in range(20, 26) for choice in (7, 8)]
    room = 3 * (10 + 2 * 2)
    monkeypatch.setattr(contexts, "POSITIONS_BY_WORDS", room * ours.vocab_size)
    ours._loglikelihood_tokens(requests)
    assert [shape for shape in passes[1:] if shape[1] == 10] == [(3, 10), (3, 10)]
    monkeypatch.setattr(contexts, "POSITIONS_BY_WORDS", 1)  # too little for any: one context at a time
    passes.clear()
    ours._loglikelihood_tokens(requests)
    assert [shape for shape in passes if shape[1] == 10] == [(1, 10)] * 6


def test_single_continuations_and_what_is_too_long_are_left_to_lm_eval(passes):
    theirs, ours = scorers(tiny_model("llama"))
    long = list(range(3, 66))
    requests = [(("", ""), [5, 6], [7]), *((("", ""), long, [choice, 8, 9]) for choice in (4, 5))]
    assert_same(ours._loglikelihood_tokens(requests), theirs._loglikelihood_tokens(requests))
    assert passes == []


def test_a_model_with_recurrent_states_is_left_to_lm_eval(passes):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    state = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8}
    config = FalconH1Config(vocab_size=VOCABULARY, num_key_value_heads=2, head_dim=8, **sizes, **state)
    theirs, ours = scorers(FalconH1ForCausalLM(config).eval())
    requests = questions()
    assert_same(ours._loglikelihood_tokens(requests), theirs._loglikelihood_tokens(requests))
    assert passes == [(1, 1)]


@pytest.mark.parametrize("cache", [None, ((torch.zeros(1), torch.zeros(1)),)])
def test_a_model_without_a_cache_that_can_be_repeated_is_left_to_lm_eval(cache, passes):
    theirs, ours = scorers(tiny_model("llama"))
    inner = ours._model

    class Other(torch.nn.Module):
        config, device = inner.config, inner.device

        def forward(self, tokens, use_cache=False):
            return SimpleNamespace(logits=inner(tokens).logits, past_key_values=cache)

    ours._model = Other()
    requests = questions()
    assert_same(ours._loglikelihood_tokens(requests), theirs._loglikelihood_tokens(requests))
    assert passes == [(1, 1)]


def test_a_model_that_cannot_leave_out_logits_gives_all(passes):
    theirs, ours = scorers(tiny_model("llama"))
    inner = ours._model

    class Other(torch.nn.Module):
        config, device = inner.config, inner.device

        def forward(self, tokens, use_cache=False, past_key_values=None):
            read = inner(tokens, use_cache=use_cache, **{cache_name(inner): past_key_values})
            return SimpleNamespace(logits=read.logits, past_key_values=getattr(read, cache_name(inner)))

    ours._model = Other()
    requests = questions()
    assert_same(ours._loglikelihood_tokens(requests), theirs._loglikelihood_tokens(requests))
    assert len(passes) > 1
