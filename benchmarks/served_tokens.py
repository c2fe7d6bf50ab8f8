"""Whether vLLM writes, over HTTP, the tokens that transformers writes: greedy, in float32, sixteen requests at a time.

    python -m benchmarks.served_tokens pruned

In the environment that `make test-vllm` makes. The requests are sent at once, so that the server batches them as they
come; transformers is asked for one after the other.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from urllib.request import Request, urlopen

import torch
from transformers import AutoTokenizer

from armorfact_hf import load_pruned
from benchmarks.serving import served

PLACES = ("Rome", "Lima", "Oslo", "Cairo", "Delhi", "Kyoto", "Paris", "Accra")
PROMPTS = [f"{start} {place}" for start in ("A short history of", "The weather in") for place in PLACES]


def from_server(address: str, model: str, prompts: Sequence[list[int]], new: int) -> list[list[int]]:
    """The tokens that the server writes after each prompt."""

    def ask(prompt: list[int]) -> list[int]:
        wanted = {"model": model, "prompt": prompt, "max_tokens": new, "temperature": 0, "return_token_ids": True}
        kind = {"Content-Type": "application/json"}
        request = Request(f"{address}/v1/completions", json.dumps(wanted).encode(), kind)
        with urlopen(request, timeout=600) as answer:
            return json.load(answer)["choices"][0]["token_ids"]

    with ThreadPoolExecutor(len(prompts)) as pool:
        return list(pool.map(ask, prompts))


def from_transformers(folder: str, prompts: Sequence[list[int]], new: int) -> Iterator[list[int]]:
    """The tokens that transformers writes after each prompt."""
    model = load_pruned(folder, dtype=torch.float32)
    for prompt in prompts:
        written = model.generate(torch.tensor([prompt]), max_new_tokens=new, do_sample=False)
        yield written[0, len(prompt) :].tolist()


def main() -> None:
    """Print how many answers are equal, and where the others part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pruned", help="a folder that `armorfact prune` wrote")
    parser.add_argument("--new", type=int, default=100, help="tokens written after a prompt")
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.pruned)
    prompts = [tokenizer(prompt).input_ids for prompt in PROMPTS]
    with served(arguments.pruned, "float32", 2 * arguments.new + 64, eager=True) as address:
        answers = from_server(address, arguments.pruned, prompts, arguments.new)
    expected = list(from_transformers(arguments.pruned, prompts, arguments.new))
    equal = sum(found == wanted for found, wanted in zip(answers, expected, strict=True))
    print(f"{equal} of {len(prompts)} answers of up to {arguments.new} tokens are equal")
    for prompt, found, wanted in zip(PROMPTS, answers, expected, strict=True):
        if found != wanted:
            place = next((k for k, (a, b) in enumerate(zip(found, wanted, strict=False)) if a != b), len(wanted))
            print(f"{prompt}: they part at token {place + 1}")


if __name__ == "__main__":
    main()
