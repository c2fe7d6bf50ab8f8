"""What it costs to keep every layer in the journal once it is pruned, beside the work that it saves from a kill.

python -m benchmarks.journal
python -m benchmarks.journal --experts 32 --hidden 256 --inner 128 --heads 4 --kv-heads 2
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import torch
import transformers

from armorfact_hf.observer import Observer
from armorfact_hf.pruning.config import PruneConfig
from armorfact_hf.pruning.prune import PruneReport, prune_
from armorfact_hf.pruning.resume.journal import LAYER, Journal


class Quiet(Observer):
    """Says nothing."""


def random_model(asked: argparse.Namespace) -> transformers.PreTrainedModel:
    """A model of random weights, with SmolLM2-135M's widths by default."""
    sizes: dict[str, Any] = {
        "vocab_size": 1024,
        "hidden_size": asked.hidden,
        "intermediate_size": asked.inner,
        "num_attention_heads": asked.heads,
        "num_key_value_heads": asked.kv_heads,
        "num_hidden_layers": asked.blocks,
    }
    torch.manual_seed(0)
    if asked.experts:
        config = transformers.MixtralConfig(**sizes, num_local_experts=asked.experts)
    else:
        config = transformers.LlamaConfig(**sizes)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def measure(asked: argparse.Namespace) -> tuple[PruneReport, list[float]]:
    """A run with a journal, and the seconds that each single layer's entry took."""
    write, seconds = Journal.write, []

    def timed(journal: Journal, key: str, finished: Any) -> None:
        start = time.perf_counter()
        write(journal, key, finished)
        if LAYER.fullmatch(key):
            seconds.append(time.perf_counter() - start)

    tokens = torch.randint(1024, (asked.windows, asked.length), generator=torch.Generator().manual_seed(1))
    with TemporaryDirectory(dir=asked.folder) as folder, mock.patch.object(Journal, "write", timed):
        report = prune_(random_model(asked), tokens, PruneConfig(baselines=()), journal=folder, observer=Quiet())
    return report, seconds


def main() -> None:
    """Prune, and print one line."""
    asked = _arguments()
    report, seconds = measure(asked)
    factorizing = sum(layer.seconds for layer in report.layers)
    print("| layers | median ms of an entry | all entries s | factorizing s | share | run s | share |")
    print("|---|---|---|---|---|---|---|")
    print(
        f"| {len(seconds)} | {1000 * sorted(seconds)[len(seconds) // 2]:.1f} | {sum(seconds):.3f} "
        f"| {factorizing:.1f} | {sum(seconds) / factorizing:.2%} "
        f"| {report.seconds:.1f} | {sum(seconds) / report.seconds:.2%} |"
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("hidden", 576), ("inner", 1536), ("heads", 9), ("kv-heads", 3), ("blocks", 2)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--experts", type=int, default=0, help="Of a mixture in place of each MLP.")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--folder", type=Path, help="On the disk that is looked at; the system's for temporary files.")
    return parser.parse_args()


if __name__ == "__main__":
    main()
