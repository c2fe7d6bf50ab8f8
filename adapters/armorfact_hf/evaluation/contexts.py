"""lm-eval's model, but that it reads the context of a question once, and not once for each of its choices.

The choices of a question continue the same text, which is longer than they are in most tasks. lm-eval shares it only
among continuations of one token.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from functools import cached_property
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from armorfact_hf.model.causal_lm import cache_name, takes

# Positions of one batch times the vocabulary: logits of up to 10 bytes each with what is made of them, 0.7 GB.
POSITIONS_BY_WORDS = 2**26
KEPT = DynamicLayer, DynamicSlidingWindowLayer  # not those with a recurrent state as well, which would stay as it is
Tokens = tuple[int, ...]
Answer = tuple[float, bool]  # log-likelihood of a continuation, and whether greedy decoding gives it


class SharedContexts(HFLM):
    """A causal model of transformers, as lm-eval wants it.

    Questions whose contexts have the same number of tokens are read together, so that nothing needs a mask: each
    choice starts at the same position, and what pads it comes after it. lm-eval's own way is left to contexts with a
    single continuation, to what is longer than the model reads, and to models without keys and values to be kept.
    """

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, override_bs: Any = None
    ) -> list[Answer]:
        questions: dict[Tokens, dict[Tokens, list[int]]] = {}
        for number, (_, context, continuation) in enumerate(requests):
            questions.setdefault(tuple(context), {}).setdefault(tuple(continuation), []).append(number)
        shared = {context: asked for context, asked in questions.items() if self._shares(context, asked)}
        answers: dict[int, Answer] = {}
        with tqdm(total=len(requests), disable=disable_tqdm, desc="Reading the choices of questions") as bar:
            for contexts in self._batches(shared):
                asked = [choice for context in contexts for choice in shared[context].items()]
                found = self._read(contexts, [list(shared[context]) for context in contexts])
                for (_, numbers), answer in zip(asked, found, strict=True):
                    answers |= dict.fromkeys(numbers, answer)
                    bar.update(len(numbers))
        left = [number for number in range(len(requests)) if number not in answers]
        rest = super()._loglikelihood_tokens([requests[number] for number in left], disable_tqdm, override_bs)
        answers |= dict(zip(left, rest, strict=True))
        return [answers[number] for number in range(len(requests))]

    def _shares(self, context: Tokens, continuations: Collection[Tokens]) -> bool:
        longest = max(map(len, continuations))
        return len(continuations) > 1 and len(context) + longest - 1 <= self.max_length and self._keeps_contexts

    @cached_property
    @torch.inference_mode()
    def _keeps_contexts(self) -> bool:
        """Whether the model gives its keys and values out, in a form whose rows can be repeated."""
        tokens = torch.tensor([[self.prefix_token_id]], device=self.device)
        cache = getattr(self._forward(tokens), cache_name(self.model), None)
        return isinstance(cache, DynamicCache) and all(type(layer) in KEPT for layer in cache.layers)

    def _batches(self, questions: Mapping[Tokens, Collection[Tokens]]) -> Iterator[list[Tokens]]:
        """Contexts of one length, as many as there is room for with all of their continuations."""
        batch: list[Tokens] = []
        for context in sorted(questions, key=len, reverse=True):
            wider = [*batch, context]
            choices = [choice for each in wider for choice in questions[each]]
            positions = len(wider) * len(context) + len(choices) * max(map(len, choices))
            if batch and (len(context) != len(batch[0]) or positions * self.vocab_size > POSITIONS_BY_WORDS):
                yield batch
                batch = []
            batch.append(context)
        if batch:
            yield batch

    @torch.inference_mode()
    def _read(self, contexts: list[Tokens], questions: list[list[Tokens]]) -> list[Answer]:
        """The answers of all choices, in order."""
        owners = torch.tensor([k for k, choices in enumerate(questions) for _ in choices], device=self.device)
        choices = [torch.tensor(choice) for choices in questions for choice in choices]
        lengths = torch.tensor([len(choice) for choice in choices], device=self.device)
        targets = pad_sequence(choices, batch_first=True).to(self.device)
        read = self._forward(torch.tensor(contexts, device=self.device), last_only=True)
        scored = [_scored(read.logits[owners, -1:], targets[:, :1])]
        if targets.shape[1] > 1:
            cache = getattr(read, cache_name(self.model))
            cache.batch_select_indices(owners)
            more = self._forward(targets[:, :-1], **{cache_name(self.model): cache})
            scored.append(_scored(more.logits, targets[:, 1:]))
        likelihoods, greedy = (torch.cat(parts, 1) for parts in zip(*scored, strict=True))
        padding = torch.arange(targets.shape[1], device=self.device) >= lengths[:, None]
        sums = likelihoods.masked_fill(padding, 0).sum(1)
        return list(zip(sums.tolist(), (greedy | padding).all(1).tolist(), strict=True))

    def _forward(self, tokens: Tensor, last_only: bool = False, **how: Any) -> Any:
        """A pass that keeps keys and values; with logits of the last position alone if they do, and the model can."""
        if last_only and takes(self.model, "logits_to_keep"):
            how["logits_to_keep"] = 1
        return self.model(tokens, use_cache=True, **how)


def _scored(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-likelihood of each target, and whether it is the likeliest; both (rows, positions)."""
    logits = logits.float()
    picked = logits.gather(2, targets[..., None])[..., 0]
    return picked - logits.logsumexp(2), logits.argmax(2) == targets
