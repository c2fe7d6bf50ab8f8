"""The peak memory of pruning a model from disk, against its largest decoder block.

    python -m benchmarks.streamed --gb 8
    python -m benchmarks.streamed --gb 0.5 --hidden 2048 --inner 16384 --heads 16 --kv-heads 4 --compare
    python -m benchmarks.streamed --gb 0.5 --hidden 1024 --inner 3584 --heads 8 --kv-heads 2 --experts 8 --compare

The model is a random Llama in bfloat16, or with --experts a Mixtral, whose experts are stored one by one. It is
written shard by shard, never whole in memory, pruned by a process of its own, and deleted. With --compare it is pruned
in memory as well, and the sha256 of every tensor is compared. Every decoder block is read and run; so that this ends
soon, only some layers of each are pruned (--include), by one sweep of SparseGPT, from a few tokens. What the process
held before it opened the model is left out of its peak: it has pruned a tiny one by then. Linux counts the peak.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import zlib
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import safe_open
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import logging

from armorfact_hf.checkpoint.description import tensor_digest
from armorfact_hf.checkpoint.shard_file import write_shard
from armorfact_hf.checkpoint.shards import INDEX, shards
from armorfact_hf.model.structure import decoder_blocks
from armorfact_hf.observer import Observer
from armorfact_hf.pruning.config import PruneConfig
from armorfact_hf.pruning.plan import Plan

VOCABULARY = 2048
SHARD = "1GB"
NOISE = 2**22 - 3  # a prime: drawn once and repeated, so that no two rows of a weight are alike and writing is fast
MODES = {"from disk": True, "in memory": False}


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=0.3, help="of the model, at least")
    parser.add_argument("--hidden", type=int, default=3072)
    parser.add_argument("--inner", type=int, default=24576)
    parser.add_argument("--heads", type=int, default=24)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--experts", type=int, default=0, help="of every block, each of the inner width")
    parser.add_argument("--include", nargs="+", default=["k_proj"], help="layers to prune in every block")
    parser.add_argument("--method", default="sparsegpt")
    parser.add_argument("--refine", choices=["block", "none"], default="none")
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--states", choices=["disk", "memory"], default="disk")
    parser.add_argument("--folder", type=Path, help="where the model is made; a temporary folder otherwise")
    parser.add_argument("--compare", action="store_true", help="prune in memory as well")
    parser.add_argument("--run", nargs=3, help=argparse.SUPPRESS)  # model, out, mode: the process that is measured
    return parser


def config_of(settings: argparse.Namespace) -> transformers.PreTrainedConfig:
    """A Llama or a Mixtral with as many blocks as the size asks for."""
    hidden, inner, shared = settings.hidden, settings.inner, settings.kv_heads / settings.heads
    experts = max(settings.experts, 1)
    block = 2 * (2 * hidden * hidden + 2 * int(shared * hidden) * hidden + 3 * experts * hidden * inner)
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": max(1, -int(-settings.gb * 1e9 // block)),
        "num_attention_heads": settings.heads,
        "num_key_value_heads": settings.kv_heads,
        "max_position_embeddings": 2048,
        "pad_token_id": 0,
        "dtype": "bfloat16",
    }
    if settings.experts:
        return transformers.MixtralConfig(num_local_experts=experts, **sizes)
    return transformers.LlamaConfig(**sizes)


def write_model(folder: Path, config: transformers.PreTrainedConfig) -> dict[str, int]:
    """Write random weights, one tensor in memory at a time; the bytes of the model and of a decoder block."""
    with torch.device("meta"):
        model: Any = transformers.AutoModelForCausalLM.from_config(config)
    shapes = revert_weight_conversion(model, model.state_dict())  # as checkpoints have them
    split = split_torch_state_dict_into_shards(
        shapes, filename_pattern="model{suffix}.safetensors", max_shard_size=SHARD
    )
    noise = torch.randn(NOISE, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)

    def drawn(name: str) -> torch.Tensor:
        like = shapes[name]
        if like.ndim == 1:
            return torch.ones(like.shape, dtype=like.dtype)
        shifted = noise.roll(zlib.crc32(name.encode()) % NOISE)
        whole = shifted.repeat(like.numel() // NOISE + 1)[: like.numel()]
        return whole.reshape(like.shape).mul_(like.shape[1] ** -0.5)

    for file, names in split.filename_to_tensors.items():
        write_shard(folder / file, {name: shapes[name] for name in names}, drawn)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index), encoding="utf-8")
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    _tokenizer().save_pretrained(folder)
    blocks = decoder_blocks(model)[1]
    return {
        "model": sum(parameter.nbytes for parameter in model.parameters()),
        "block": max(sum(parameter.nbytes for parameter in block.parameters()) for block in blocks),
        "blocks": len(blocks),
    }


def _tokenizer() -> transformers.PreTrainedTokenizerFast:
    words = {"<unk>": 0, **{f"w{k}": k for k in range(1, VOCABULARY)}}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")


def _write_text(path: Path, words: int) -> None:
    numbers = torch.randint(1, VOCABULARY, (words,), generator=torch.Generator().manual_seed(1))
    path.write_text(" ".join(f"w{k}" for k in numbers.tolist()), encoding="utf-8")


class _Planned(Observer):
    """Keeps the plan."""

    plans: list[Plan]

    def __init__(self) -> None:
        self.plans = []

    def say(self, sentence: str) -> None:
        pass

    def plan(self, plan: Plan) -> None:
        self.plans.append(plan)


def measured_run(settings: argparse.Namespace) -> None:
    """Prune, and print what it took as JSON; in a process of its own."""
    from armorfact_hf.data.load_model import load_model, open_model
    from armorfact_hf.runs.prune_to_folder import Calibration, peak_memory, prune_to_folder

    folder, out, mode = settings.run
    logging.disable_progress_bar()
    config = PruneConfig(
        method=settings.method,
        include=tuple(settings.include),
        refine=None if settings.refine == "none" else settings.refine,
        baselines=(),
    )
    observer = _Planned()

    def prune(folder: str, out: Path, windows: int, length: int) -> None:
        loaded = (open_model if MODES[mode] else load_model)(folder, log=observer.say)
        calibration = Calibration(f"{folder}/text.txt", windows, length)
        prune_to_folder(loaded, out, config, calibration, observer=observer, states=settings.states)

    with TemporaryDirectory() as place:  # imports and compiles all that a run needs
        _write_small(Path(place))
        prune(place, Path(place) / "out", 2, 8)
    before, start = forget_peak(), time.perf_counter()
    prune(folder, Path(out), settings.windows, settings.length)
    plan = observer.plans[-1]
    found = {
        "peak": peak_memory() - before,
        "planned": plan.peak_bytes,
        "statistics": plan.memory.statistics,
        "seconds": time.perf_counter() - start,
    }
    print(json.dumps(found))


def _write_small(folder: Path) -> None:
    small = ["--gb", "0.00001", "--hidden", "32", "--inner", "64", "--heads", "2", "--kv-heads", "1"]
    write_model(folder, config_of(arguments().parse_args(small)))
    _write_text(folder / "text.txt", 64)


def forget_peak() -> int:
    """Let Linux count the peak of this process anew; the bytes that it holds now."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    [line] = (line for line in status.splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) * 1024


def digests(folder: Path) -> dict[str, str]:
    """The sha256 of every tensor of a folder."""
    found = {}
    for path in shards(folder):
        with safe_open(path, "pt") as stored:
            found |= {name: tensor_digest(stored.get_tensor(name)) for name in stored.keys()}  # noqa: SIM118
    return found


def main() -> None:
    settings = arguments().parse_args()
    if settings.run:
        measured_run(settings)
        return
    with TemporaryDirectory(prefix="streamed-", dir=settings.folder) as place:
        folder = Path(place) / "model"
        folder.mkdir()
        start = time.perf_counter()
        sizes = write_model(folder, config_of(settings))
        _write_text(folder / "text.txt", 4 * settings.windows * settings.length)
        print(
            f"a {'Mixtral' if settings.experts else 'Llama'} of {sizes['blocks']} decoder blocks of "
            f"{sizes['block'] / 1e9:.3f} GB, {sizes['model'] / 1e9:.2f} GB in all, written in "
            f"{time.perf_counter() - start:.0f} s; {', '.join(settings.include)} pruned by {settings.method}, "
            f"{settings.windows} x {settings.length} tokens\n"
        )
        print("| pruned | peak, GB | of the model | statistics, GB | the rest, in blocks | planned, GB | seconds |")
        print("|---|---|---|---|---|---|---|")
        written = [_row(mode, folder, sizes) for mode in (MODES if settings.compare else ["from disk"])]
        if settings.compare:
            print(f"\nthe sha256 of {len(written[0])} tensors: {'equal' if written[0] == written[1] else 'DIFFERENT'}")


def _row(mode: str, folder: Path, sizes: dict[str, int]) -> dict[str, str]:
    out = folder.with_name(mode.replace(" ", "-"))
    command = [sys.executable, "-m", "benchmarks.streamed", *sys.argv[1:], "--run", str(folder), str(out), mode]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found = json.loads(done.stdout.splitlines()[-1])
    rest = (found["peak"] - found["statistics"]) / sizes["block"]
    cells = [
        f"{found['peak'] / 1e9:.3f}",
        f"{found['peak'] / sizes['model']:.3f}",
        f"{found['statistics'] / 1e9:.3f}",
        f"{rest:.2f}",
        f"{found['planned'] / 1e9:.3f}",
        f"{found['seconds']:.0f}",
    ]
    print(f"| {mode} | {' | '.join(cells)} |", flush=True)
    return digests(out)


if __name__ == "__main__":
    main()
