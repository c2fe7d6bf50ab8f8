"""Work in other processes ends with the bits of one process, whoever is killed on the way."""

from __future__ import annotations

import os
import secrets
import signal
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
from tests.hf.models import random_tokens, tiny_model
from tests.hf.observers import Stepping
from tests.hf.processes import begin, exit_code
from tests.hf.runs.folders import OURS, prune

SETTINGS = {
    "tail and head": ("llama", {"tail": 2, "head": True}, 2),
    "experts": ("gpt_oss", {"refine": None, "include": (r"re:model\.layers\.1\..*",)}, 1),
    "int8 cores": ("llama", {"tail": 2, "core_dtype": "int8"}, 2),
    "blocks that return tuples": ("falcon", {"target": "output", "tail": 0, "ignore": (r"re:.*\.1\..*",)}, 1),
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
    ("weights", "way_out"),
    [
        (SimpleNamespace(device=torch.device("cuda")), "take --device cpu"),
        (OnDisk.__new__(OnDisk), "take --no-stream"),
    ],
)
def test_what_other_processes_cannot_do_is_refused(weights, way_out, monkeypatch):
    monkeypatch.setattr(choice, "find_spec", lambda name: name)
    monkeypatch.setattr(OnDisk, "device", torch.device("cpu"), raising=False)
    with pytest.raises(ValueError, match=f"{way_out}.* leave --workers out"):
        check_workers(2, SimpleNamespace(weights=weights))


# With Ray


PATIENCE = {  # for a machine that is at other work too: by default Ray's processes are the last to get a turn there
    "RAY_worker_niceness": "0",
    "RAY_raylet_start_wait_time_s": "300",
    "RAY_worker_register_timeout_seconds": "300",
    "RAY_health_check_failure_threshold": "100",
}


@pytest.fixture(scope="module")
def cluster():
    """Two cores of this machine, for all tests of the module; its address."""
    ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'armorfact[ray]'")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    token = secrets.token_hex(16)  # or Ray writes one into the home folder
    with mock.patch.dict(os.environ, {"RAY_AUTH_TOKEN": token} | PATIENCE):
        ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
        yield ray.get_runtime_context().gcs_address
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


@pytest.mark.usefixtures("cluster")
def test_a_run_that_one_process_began_goes_on_in_others(tmp_path):
    changes = {"tail": 0, "include": (r"re:model\.layers\.[01]\..*",)}
    told = []

    def interrupt(step) -> None:
        if "layers.1.mlp" in step.doing:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        ended("mixtral", changes, Stepping(interrupt), journal=tmp_path)
    found = ended("mixtral", changes, Stepping(told.append), journal=tmp_path, workers=1)
    assert sum(step.doing.endswith("is finished already") for step in told) > 1
    assert found == ended("mixtral", changes)


@torch.no_grad()
@pytest.mark.usefixtures("cluster")
def test_what_fails_elsewhere_is_told_as_it_is_here():
    model = tiny_model("llama")
    model.model.layers[1].mlp.gate_proj.weight[0] = 3e38
    with pytest.raises(NonFiniteActivations, match=r"^model\.layers\.1\.mlp\.gate_proj is the first .* window 0"):
        prune_(model, random_tokens(), PruneConfig(sweeps=1, include=("re:.*attn.*",)), workers=1)


@pytest.fixture
def dying(tmp_path, monkeypatch) -> list[Path]:
    """The first layer to be pruned and the first worker to tune the second block end as a kill from outside would.

    That happens where the work is done, so no time has to be met. Returns a file for each, which is there afterwards.
    """
    from armorfact_hf.pruning.workers import on_ray, remote

    task, actor = tmp_path / "task", tmp_path / "actor"

    def die(once: Path) -> None:
        if not once.exists():
            once.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    def prune(*arguments):
        die(task)
        return remote.prune(*arguments)

    class Worker(remote.Worker):
        def tune(self, index, *arguments):
            found = super().tune(index, *arguments)
            if index == 1:
                die(actor)
            return found

    changed = {"prune": prune, "Worker": Worker}
    monkeypatch.setattr(on_ray, "remote", SimpleNamespace(**vars(remote) | changed))
    return [task, actor]


@pytest.mark.usefixtures("cluster")
def test_processes_that_are_killed_are_replaced_and_the_bits_are_the_same(dying):
    changes = {"tail": 0}
    assert ended("llama", changes, workers=1) == ended("llama", changes)
    assert all(once.exists() for once in dying)


def die_in_the_second_block(model: Path, out: Path, text: Path, address: str) -> None:
    """The process that leads the run, killed where it cannot clean up."""

    def progress(step) -> None:
        if step.doing.startswith("decoder block 2, tuned"):
            os.kill(os.getpid(), signal.SIGKILL)

    os.environ["RAY_ADDRESS"] = address
    prune(model, out, text, OURS, observer=Stepping(progress), workers="ray")


def test_a_run_whose_leader_was_killed_is_resumed(cluster, model_folder, text_file, tmp_path):
    prune(model_folder, tmp_path / "whole", text_file, OURS)
    out = tmp_path / "out"
    leader = begin(die_in_the_second_block, model_folder, out, text_file, cluster)
    leader.join(600)
    assert exit_code(leader) == -signal.SIGKILL
    kept = {"block-0000", *(f"block-0001-layer-{k:04}" for k in range(7))}
    assert {path.stem for path in (tmp_path / "out.journal").glob("*.safetensors")} == kept
    steps = []
    prune(model_folder, out, text_file, OURS, observer=Stepping(steps.append), workers="ray")
    assert sum(step.doing.endswith("is finished already") for step in steps) == 1 + 7
    weights = [(tmp_path / folder / "model.safetensors").read_bytes() for folder in ("whole", "out")]
    assert weights[0] == weights[1]
