"""Runs vLLM in a process of its own, on one folder after another; prints a line of JSON for each.

    python -m tests.hf.vllm.engine '[{"folder": "pruned", "ranks": 1}]'

With several ranks vLLM takes a process for each, and so a core.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from typing import Any

PROMPTS = [[3, 4, 5, 6, 7], [10, 11, 12], [20, 30, 40, 50, 60, 70]]
NEW_TOKENS = 20
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}


def generated(folder: str, ranks: int, **settings: Any) -> list[list[int]]:
    """The tokens that vLLM writes greedily after each of `PROMPTS`, all at once."""
    from vllm import LLM, SamplingParams

    settings = {"enforce_eager": True, "dtype": "float32"} | settings
    model = LLM(folder, max_model_len=64, max_num_seqs=4, tensor_parallel_size=ranks, **settings)
    greedily = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, detokenize=False)
    found = model.generate([{"prompt_token_ids": prompt} for prompt in PROMPTS], greedily, use_tqdm=False)
    return [list(request.outputs[0].token_ids) for request in found]


def main() -> None:
    """Print what became of each case: {"tokens": ...} or {"error": ...}."""
    cases = json.loads(sys.argv[1])
    alone = all(case["ranks"] == 1 for case in cases)
    cores = sorted(os.sched_getaffinity(0))
    os.environ.update(ENVIRONMENT, VLLM_ENABLE_V1_MULTIPROCESSING=str(int(not alone)))
    if not alone:  # without this vLLM wants a NUMA node for each rank
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(str(cores[rank]) for rank in range(2))
    for case in cases:
        try:
            found = {"tokens": generated(**case)}
        except Exception as error:
            found = {"error": f"{type(error).__name__}: {error}"}
        gc.collect()
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
