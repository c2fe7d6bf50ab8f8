"""The peak memory of pruning a model from disk, against its largest decoder block.

    python -m benchmarks.streamed --gb 8
    python -m benchmarks.streamed --gb 0.5 --hidden 2048 --inner 16384 --heads 16 --kv-heads 4 --compare
    python -m benchmarks.streamed --gb 0.5 --hidden 1024 --inner 3584 --heads 8 --kv-heads 2 --experts 8 --compare
    python -m benchmarks.streamed --gb 0.5 --hidden 1024 --inner 4096 --heads 8 --kv-heads 2 --compare --workers 2

The model is a random Llama in bfloat16, or with --experts a Mixtral, whose experts are stored one by one. It is
written shard by shard, never whole in memory, pruned by a process of its own, and deleted. With --compare it is pruned
in memory as well, and the sha256 of every tensor is compared. Every decoder block is read and run; so that this ends
soon, only some layers of each are pruned (--include), by one sweep of SparseGPT, from a few tokens. What the process
held before it opened the model is left out of its peak: it has pruned a tiny one by then. Linux counts the peak.
With --workers it is pruned by so many of Ray's processes as well; what the largest of them held while it pruned the
tiny one is left out of theirs.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from safetensors import safe_open
from transformers.utils import logging

from armorfact_hf.checkpoint.description import tensor_digest
from armorfact_hf.checkpoint.shards import shards
from armorfact_hf.observer import Observer
from armorfact_hf.pruning.config import PruneConfig
from armorfact_hf.pruning.plan import Plan
from benchmarks.random_models import config_of, write_model, write_text
from benchmarks.watched import watched_workers

MODES = {"from disk": True, "in memory": False}
BY_WORKERS = ", by workers"  # at the end of a mode

HEADERS = "pruned", "peak, GB", "of the model", "statistics, GB", "the rest, in blocks", "planned, GB", "seconds"
OF_WORKERS = "a worker's peak, GB", "planned, GB"


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
    parser.add_argument("--workers", type=int, help="prune by so many other processes as well")
    parser.add_argument("--run", nargs=3, help=argparse.SUPPRESS)  # model, out, mode: the process that is measured
    return parser


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
    from armorfact_hf.data.calibration import Calibration
    from armorfact_hf.data.load_model import load_model, open_model
    from armorfact_hf.free_memory import peak_memory
    from armorfact_hf.runs.prune_to_folder import prune_to_folder

    folder, out, mode = settings.run
    workers = settings.workers if mode.endswith(BY_WORKERS) else None
    logging.disable_progress_bar()
    config = PruneConfig(
        method=settings.method,
        include=tuple(settings.include),
        refine=None if settings.refine == "none" else settings.refine,
        baselines=(),
    )
    observer = _Planned()

    def prune(folder: str, out: Path, windows: int, length: int) -> int:
        """Returns the peak of the largest worker, or 0."""
        loaded = (open_model if MODES[mode.removesuffix(BY_WORKERS)] else load_model)(
            folder, device="cpu", log=observer.say
        )
        calibration = Calibration(f"{folder}/text.txt", windows, length)
        states = "auto" if workers else settings.states
        with watched_workers() as peaks:
            prune_to_folder(loaded, out, config, calibration, observer=observer, states=states, workers=workers)
        return max(peaks.values(), default=0)

    with TemporaryDirectory() as place:  # imports and compiles all that a run needs
        _write_small(Path(place))
        small = prune(place, Path(place) / "out", 2, 8)
    before, start = forget_peak(), time.perf_counter()
    largest = prune(folder, Path(out), settings.windows, settings.length)
    plan = observer.plans[-1]
    found = {
        "peak": peak_memory() - before,
        "planned": plan.memory.peak,
        "statistics": plan.memory.statistics,
        "small": small,
        "worker": largest - small,
        "planned worker": 0 if plan.cluster is None else plan.cluster.worker.peak,
        "seconds": time.perf_counter() - start,
    }
    print(json.dumps(found))


def _write_small(folder: Path) -> None:
    small = ["--gb", "0.00001", "--hidden", "32", "--inner", "64", "--heads", "2", "--kv-heads", "1"]
    write_model(folder, config_of(arguments().parse_args(small)))
    write_text(folder / "text.txt", 64)


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
        write_text(folder / "text.txt", 4 * settings.windows * settings.length)
        print(
            f"a {'Mixtral' if settings.experts else 'Llama'} of {sizes['blocks']} decoder blocks of "
            f"{sizes['block'] / 1e9:.3f} GB, {sizes['model'] / 1e9:.2f} GB in all, written in "
            f"{time.perf_counter() - start:.0f} s; {', '.join(settings.include)} pruned by {settings.method}, "
            f"{settings.windows} x {settings.length} tokens\n"
        )
        headers = (*HEADERS, *OF_WORKERS) if settings.workers else HEADERS
        print(f"| {' | '.join(headers)} |\n|{'---|' * len(headers)}")
        modes = list(MODES) if settings.compare else ["from disk"]
        modes += [mode + BY_WORKERS for mode in modes] if settings.workers else []
        first, *others = [_row(mode, folder, sizes) for mode in modes]
        if others:
            same = all(written == first for written in others)
            print(f"\nthe sha256 of {len(first)} tensors: {'equal' if same else 'DIFFERENT'}")


def _row(mode: str, folder: Path, sizes: dict[str, int]) -> dict[str, str]:
    out = folder.with_name(mode.replace(" ", "-").replace(",", ""))
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
    if mode.endswith(BY_WORKERS):
        peak = f"{found['worker'] / 1e9:.3f}, and {found['small'] / 1e9:.3f} before"
        cells += [peak, f"{found['planned worker'] / 1e9:.3f}"]
    print(f"| {mode} | {' | '.join(cells)} |", flush=True)
    return digests(out)


if __name__ == "__main__":
    main()
