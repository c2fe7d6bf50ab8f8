"""Work in other processes ends with the bits of one process, whoever is killed on the way."""

from __future__ import annotations

import os
import secrets
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from armorfact_hf.model.nonfinite import NonFiniteActivations
from armorfact_hf.model.on_disk import OnDisk
from armorfact_hf.pruning.config import PruneConfig
from armorfact_hf.pruning.fingerprint import model_fingerprint
from armorfact_hf.pruning.prune import prune_
from armorfact_hf.pruning.workers import choice
from armorfact_hf.pruning.workers.choice import check_workers
from tests.hf.models import BLOCKS, random_tokens, tiny_model
from tests.hf.observers import Stepping
from tests.hf.processes import begin, exit_code
from tests.hf.runs.folders import OURS, prune

SETTINGS = {
    "tail and head": ("llama", {"tail": 2, "head": True}, 2),
    "blocks that return tuples": ("falcon", {"target": "output", "tail": 0, "ignore": (r"re:.*\.1\..*",)}, 1),
}
KILLS = {
    f"decoder block 1 of {BLOCKS}, window 4": "ray::prune",
    f"decoder block 2 of {BLOCKS}, window 1": "ray::Worker",
    "decoder block 2, tuned as a whole": "ray::Worker.tune",
}


# Without Ray


@pytest.mark.parametrize("wrong", ["many", "0", 0, "-2", "2.5"])
def test_workers_that_are_none_are_refused_before_any_work(wrong):
    with pytest.raises(ValueError, match="'ray' or a number of processes"):
        prune_(None, None, workers=wrong)


def test_without_ray_a_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setattr(choice, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'armorfact\[ray\]'"):
        prune_(None, None, workers=2)


@pytest.mark.parametrize(
    ("weights", "stored_in", "way_out"),
    [
        (SimpleNamespace(device=torch.device("cuda")), ("up", None), "take --device cpu"),
        (SimpleNamespace(device=torch.device("cpu")), ("experts.up", 4), "leave them dense"),
        (OnDisk.__new__(OnDisk), ("up", None), "take --no-stream"),
    ],
)
def test_what_other_processes_cannot_do_is_refused(weights, stored_in, way_out, monkeypatch):
    monkeypatch.setattr(choice, "find_spec", lambda name: name)
    monkeypatch.setattr(OnDisk, "device", torch.device("cpu"), raising=False)
    job = SimpleNamespace(weights=weights, layers=[SimpleNamespace(name="up", stored_in=stored_in)])
    with pytest.raises(ValueError, match=f"{way_out}.* leave --workers out"):
        check_workers(2, job)


# With Ray


def environment() -> dict[str, str]:
    """A token, or Ray writes one into the home folder; and patience, for machines that are at other work too."""
    return {"RAY_AUTH_TOKEN": secrets.token_hex(16), "RAY_raylet_start_wait_time_s": "300"}


@pytest.fixture(scope="module")
def cluster():
    """Two cores of this machine, for all tests of the module."""
    ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'armorfact[ray]'")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with mock.patch.dict(os.environ, environment()):
        ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
        yield
        ray.shutdown()
    torch.set_num_threads(threads)


def ended(family: str, changes: dict, observer=None, **more):
    """All that must not depend on who works: the weights, the losses, how blocks were tuned, what was told."""
    model, steps = tiny_model(family), []
    config = PruneConfig(**{"sweeps": 2, "passes": 1, "baselines": ("sparsegpt",)} | changes)
    report = prune_(model, random_tokens(4), config, observer=observer or Stepping(steps.append), **more)
    assert observer is not None or steps[-1].done == steps[-1].total
    return model_fingerprint(model), [layer.losses for layer in report.layers], report.blocks


@pytest.mark.parametrize(("family", "changes", "workers"), SETTINGS.values(), ids=SETTINGS)
@pytest.mark.usefixtures("cluster")
def test_workers_give_the_bits_of_one_process(family, changes, workers):
    assert ended(family, changes, workers=workers) == ended(family, changes)


@torch.no_grad()
@pytest.mark.usefixtures("cluster")
def test_what_fails_elsewhere_is_told_as_it_is_here():
    model = tiny_model("llama")
    model.model.layers[1].mlp.gate_proj.weight[0] = 3e38
    with pytest.raises(NonFiniteActivations, match=r"^model\.layers\.1\.mlp\.gate_proj is the first .* window 0"):
        prune_(model, random_tokens(), PruneConfig(sweeps=1, include=("re:.*attn.*",)), workers=1)


class Killing(Stepping):
    """Once a step of `KILLS` begins, kills the first process of Ray that has the title there."""

    def __init__(self) -> None:
        super().__init__(self.look)
        self.threads: dict[str, threading.Thread] = {}
        self.killed: list[str] = []

    def look(self, step) -> None:
        if step.doing in KILLS and step.doing not in self.threads:
            self.threads[step.doing] = threading.Thread(target=self.kill, args=(KILLS[step.doing],))
            self.threads[step.doing].start()

    def kill(self, wanted: str) -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            for process in descendants(os.getpid()):
                if title(process).startswith(wanted):
                    os.kill(process, signal.SIGKILL)
                    self.killed.append(wanted)
                    return
            time.sleep(0.01)


def title(process: int) -> str:
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


def descendants(process: int) -> list[int]:
    """The processes that a process has started, and those that they have."""
    parents = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(status.parent.name)] = int(status.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    found, new = set(), {process}
    while new:
        found |= new
        new = {child for child, parent in parents.items() if parent in new} - found
    return sorted(found - {process})


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are found in /proc, as Linux has it")
@pytest.mark.usefixtures("cluster")
def test_processes_that_are_killed_are_replaced_and_the_bits_are_the_same():
    observer = Killing()
    assert ended("llama", {"tail": 2}, observer, workers=2) == ended("llama", {"tail": 2})
    for thread in observer.threads.values():
        thread.join()
    assert sorted(observer.killed) == sorted(KILLS.values())


def die_in_the_second_block(model: Path, out: Path, text: Path) -> None:
    """The process that leads the run, killed where it cannot clean up."""

    def progress(step) -> None:
        if step.doing.startswith("decoder block 2, tuned"):
            os.kill(os.getpid(), signal.SIGKILL)

    os.environ |= environment()
    prune(model, out, text, OURS, observer=Stepping(progress), workers=2)


@pytest.mark.usefixtures("cluster")
def test_a_run_whose_leader_was_killed_is_resumed(model_folder, text_file, tmp_path):
    prune(model_folder, tmp_path / "whole", text_file, OURS)
    out = tmp_path / "out"
    leader = begin(die_in_the_second_block, model_folder, out, text_file)
    leader.join(300)
    assert exit_code(leader) == -signal.SIGKILL
    assert [path.name for path in (tmp_path / "out.journal").glob("*.safetensors")] == ["block-0000.safetensors"]
    prune(model_folder, out, text_file, OURS, workers=2)
    weights = [(tmp_path / folder / "model.safetensors").read_bytes() for folder in ("whole", "out")]
    assert weights[0] == weights[1]
