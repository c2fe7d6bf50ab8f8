"""Work in other processes ends with the bits of one process, whoever is killed on the way."""

from __future__ import annotations

import os
import pickle
import secrets
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from armorfact_hf.checkpoint.fingerprint import model_fingerprint
from armorfact_hf.cli.tables import plan_lines
from armorfact_hf.model.nonfinite import NonFiniteActivations
from armorfact_hf.pruning.config import PruneConfig
from armorfact_hf.pruning.job import make_job
from armorfact_hf.pruning.plan import plan_job
from armorfact_hf.pruning.prune import prune_
from armorfact_hf.pruning.workers import choice
from armorfact_hf.pruning.workers.choice import check_workers, gpu_share
from armorfact_hf.pruning.workers.sent import sent
from tests.hf.models import BLOCKS, random_tokens, tiny_model
from tests.hf.observers import Stepping
from tests.hf.processes import begin, exit_code
from tests.hf.runs.folders import OURS, QUICK, loaded, prune, pruned_files, saved

SETTINGS = {
    "tail and head": ("llama", {"tail": 2, "head": True}, 2),
    "experts": ("gpt_oss", {"refine": None, "include": (r"re:model\.layers\.1\..*",)}, 1),
    "int8 cores": ("llama", {"tail": 2, "core_dtype": "int8"}, 2),
    "blocks by prices": ("qwen2", {"tail": 0, "block": "priced"}, 1),
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
    ("device", "changes", "way_out"),
    [
        ("mps", {}, "take --device cpu"),
        ("cuda:1", {}, "take --device cuda"),
        ("cpu", {"states": "disk"}, "leave --states out"),
        ("cpu", {"experts_at_once": 2}, "leave experts_at_once out"),
    ],
)
def test_what_other_processes_cannot_do_is_refused(device, changes, way_out, monkeypatch):
    monkeypatch.setattr(choice, "find_spec", lambda name: name)
    job = make_job(tiny_model("llama"), random_tokens(), **changes)
    weights = SimpleNamespace(device=torch.device(device))
    with pytest.raises(ValueError, match=f"{way_out}, or leave --workers out"):
        check_workers(2, replace(job, weights=weights))


def test_what_they_cannot_do_is_refused_before_there_is_a_journal(monkeypatch, tmp_path):
    monkeypatch.setattr(choice, "find_spec", lambda name: name)
    config = PruneConfig(block="priced", refine=None)
    with pytest.raises(ValueError, match="leave --states out"):
        prune_(tiny_model("llama"), random_tokens(), config, workers=2, states="disk", journal=tmp_path / "journal")
    assert not (tmp_path / "journal").exists()


@pytest.mark.parametrize("gpus", range(1, 6))
@pytest.mark.parametrize("workers", range(1, 9))
def test_every_worker_finds_its_share_of_a_gpu(workers, gpus):
    share = gpu_share(workers, gpus)
    on_each = int(1 / share)  # as many shares as a GPU has
    assert on_each * gpus >= workers > (on_each - 1) * gpus or share == 1
    assert gpu_share(workers, 0) == 0


@pytest.mark.parametrize("family", ["llama", "mixtral"])
@pytest.mark.usefixtures("own_cache")
def test_a_job_on_disk_travels_without_its_model(family, tmp_path):
    opened = loaded(saved(family, tmp_path / "model"), stream=True)
    job = make_job(
        opened.model, random_tokens(), QUICK, lambda name, _: "layers.0." not in name, weights=opened.weights
    )
    job = replace(job, layers=tuple(replace(layer, block=(8, 8)) for layer in job.layers))  # as prices may choose
    packed = pickle.dumps(sent(job))
    assert len(packed) < 50_000 < sum(weight.nbytes for weight in opened.model.parameters())
    found = pickle.loads(packed)()
    assert found.model is not job.model
    assert all(weight.is_meta for block in found.blocks for weight in block.parameters())
    assert [(x.name, x.block, x.shape) for x in found.layers] == [(x.name, x.block, x.shape) for x in job.layers]
    assert found.manifest == job.manifest


@pytest.mark.usefixtures("own_cache")
def test_a_folder_that_another_machine_does_not_see_is_told(model_folder):
    opened = loaded(model_folder, stream=True)
    there = sent(make_job(opened.model, random_tokens(), weights=opened.weights))
    model_folder.rename(model_folder.with_name("elsewhere"))
    with pytest.raises(ValueError, match=r"model\.safetensors is not there on .*: every machine has to see"):
        there()


@pytest.mark.usefixtures("own_cache")
def test_a_worker_holds_the_block_that_it_is_at(model_folder):
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'armorfact[ray]'")
    from armorfact_hf.pruning.workers import remote

    opened = loaded(model_folder, stream=True)
    job = make_job(opened.model, random_tokens(), PruneConfig(head=True), weights=opened.weights)
    worker, held = remote.Worker(sent(job), 1), remote.Held()

    def in_memory() -> list[int]:
        blocks = enumerate(worker.job.blocks)
        return [index for index, block in blocks if not next(block.parameters()).is_meta]

    assert in_memory() == []
    for index in range(BLOCKS):
        worker.inputs(index, 0, held, None, [])
        _, held = worker.advance([index], 0, held, [])
        assert in_memory() == [index]
    worker.inputs(None, 0, held, None, [])
    assert in_memory() == []


@pytest.mark.usefixtures("own_cache")
def test_the_plan_counts_every_process(model_folder, monkeypatch):
    jobs = {}
    for stream in (False, True):
        found = loaded(model_folder, stream)
        jobs[stream] = make_job(found.model, random_tokens(), PruneConfig(tail=1), weights=found.weights)
    whole, streamed = (plan_job(jobs[stream], measure=False, workers=2) for stream in (False, True))
    assert streamed.cluster.worker.weights == streamed.cluster.leader.weights < whole.cluster.worker.weights
    assert streamed.peak_bytes < whole.peak_bytes
    assert whole.cluster.leader.work >= 2 * whole.cluster.worker.weights  # pickled, a model is bytes twice
    assert whole.cluster.worker.work >= whole.cluster.worker.weights
    assert plan_job(jobs[True], measure=False, workers=3).peak_bytes == (
        streamed.peak_bytes + streamed.cluster.worker.peak
    )
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 7 * torch.get_num_threads())
    assert plan_job(jobs[True], measure=False, workers="ray").cluster.workers == 7  # as many as the cores allow
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert plan_job(jobs[True], measure=False, workers="ray").cluster.workers == 1  # a cluster says how many
    priced = PruneConfig(tail=1, block="priced")
    job = make_job(jobs[False].model, random_tokens(), priced)
    leader = plan_job(job, measure=False, workers=2).cluster.leader
    assert leader.states > 0 and leader.work > whole.cluster.leader.work  # which finds the prices by itself
    told = " ".join(plan_lines(streamed))
    assert "Memory of each worker, at most" in told and "Ray's object store" in told


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


def quick(changes: dict) -> dict:
    """With one pass, where blocks are tuned."""
    return changes if "refine" in changes else {"passes": 1} | changes


def ended(family: str, changes: dict, observer=None, **more):
    """All that must not depend on who works: the weights, the losses, how blocks were tuned, what was told."""
    model, steps = tiny_model(family), []
    config = PruneConfig(sweeps=2, baselines=("sparsegpt",), **quick(changes))
    report = prune_(model, random_tokens(4), config, observer=observer or Stepping(steps.append), **more)
    assert observer is not None or steps[-1].done == steps[-1].total
    return model_fingerprint(model), [layer.losses for layer in report.layers], report.blocks


@pytest.mark.parametrize(("family", "changes", "workers"), SETTINGS.values(), ids=SETTINGS)
@pytest.mark.usefixtures("cluster")
def test_workers_give_the_bits_of_one_process(family, changes, workers):
    assert ended(family, changes, workers=workers) == ended(family, changes)


FROM_DISK = {
    "tail and head": ("llama", {"tail": 2, "head": True}, {}),
    "experts": ("mixtral", {"refine": None}, {}),
    "int8 cores of a head of its own": ("qwen2", {"tail": 2, "core_dtype": "int8", "ignore": (r"re:.*\.0\..*",)}, {}),
    "blocks by prices": ("llama", {"tail": 0, "block": "priced"}, {"hidden_size": 96, "intermediate_size": 192}),
}


@pytest.mark.parametrize(("family", "changes", "sizes"), FROM_DISK.values(), ids=FROM_DISK)
@pytest.mark.usefixtures("cluster", "own_cache")
def test_workers_that_read_from_disk_write_the_files_of_one_process(family, changes, sizes, tmp_path, text_file):
    model = saved(family, tmp_path / "model", dtype=torch.bfloat16, max_shard_size="50KB", **sizes)
    config = PruneConfig(sweeps=1, baselines=(), **quick(changes))
    in_memory = pruned_files(model, tmp_path / "in-memory", text_file, config, stream=False)
    for workers in (None, 2):
        assert (
            pruned_files(model, tmp_path / f"{workers}", text_file, config, stream=True, workers=workers) == in_memory
        )


@pytest.mark.usefixtures("cluster")
def test_workers_that_do_all_by_turns_give_the_same_bits(monkeypatch):
    from armorfact_hf.pruning.workers import hands, on_ray

    monkeypatch.setattr(on_ray, "hands_of", lambda actors, on_gpus: hands.Turns(actors))  # as where each has a GPU
    family, changes, workers = SETTINGS["int8 cores"]
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


@pytest.mark.usefixtures("cluster", "own_cache")
def test_the_same_where_they_read_from_disk(dying, model_folder, text_file, tmp_path):
    config = replace(OURS, passes=1, tail=2)
    alone, killed = (
        pruned_files(model_folder, tmp_path / f"{workers}", text_file, config, stream=True, workers=workers)
        for workers in (None, 1)
    )
    assert killed == alone
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
