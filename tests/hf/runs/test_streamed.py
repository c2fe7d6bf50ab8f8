"""A model pruned from disk, a decoder block at a time: the same files as from memory, and refused before any work."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import ZambaConfig, ZambaForCausalLM

from armorfact_hf.checkpoint import fingerprint
from armorfact_hf.checkpoint.fingerprint import model_fingerprint
from armorfact_hf.checkpoint.folder import load_pruned
from armorfact_hf.data.calibration import Calibration
from armorfact_hf.data.load_model import load_model, open_model
from armorfact_hf.data.wheels import cache_folder
from armorfact_hf.model.on_disk import NotStreamable, OnDisk
from armorfact_hf.pruning import job as jobs
from armorfact_hf.pruning.config import PruneConfig
from armorfact_hf.pruning.memory import memory_of, model_bytes
from armorfact_hf.pruning.plan import plan_job
from armorfact_hf.pruning.resume.manifest import DifferentRun
from armorfact_hf.pruning.workers import in_process
from armorfact_hf.report.record import Report
from armorfact_hf.runs import load_to_prune as choosing
from armorfact_hf.runs import prune_to_folder as workflow
from armorfact_hf.runs.inspect import inspect_folder
from armorfact_hf.runs.load_to_prune import job_of, load_to_prune
from armorfact_hf.runs.prune_to_folder import prune_to_folder
from tests.hf.models import BLOCKS, tiny_model, word_tokenizer
from tests.hf.observers import Silent, Stepping
from tests.hf.processes import begin, exit_code
from tests.hf.runs.folders import QUICK, loaded, names, prune, pruned_files, saved, silent
from tests.hf.settings import layers_alone

pytestmark = pytest.mark.usefixtures("own_cache")

MATCHED = PruneConfig(sweeps=1, passes=1, tail=2, baselines=())
SETTINGS = {
    "layers alone": layers_alone(MATCHED),
    "blocks and tail": MATCHED,
    "with the head": replace(MATCHED, head=True),
    "int8 cores": replace(MATCHED, core_dtype="int8"),
}


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        *((family, "blocks and tail") for family in ("llama", "qwen2", "gemma3", "gpt2", "falcon")),
        *((family, "layers alone") for family in ("llama", "gemma3")),
        ("qwen2", "with the head"),
        ("llama", "int8 cores"),
        ("gemma3", "with the head"),
        ("gpt_oss", "layers alone"),
        ("gpt_oss", "blocks and tail"),
    ],
)
def test_the_files_are_those_of_the_run_in_memory(family, settings, tmp_path, text_file):
    model = saved(family, tmp_path / "model", dtype=torch.bfloat16, max_shard_size="50KB")
    from_memory, from_disk = (
        pruned_files(model, tmp_path / f"out-{stream}", text_file, SETTINGS[settings], stream)
        for stream in (False, True)
    )
    assert from_disk == from_memory
    assert names(tmp_path) == {"model", "text.txt", "out-False", "out-True"}
    assert len(inspect_folder(tmp_path / "out-True")) >= 4 * BLOCKS


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_prices_from_disk_choose_the_same_blocks(family, tmp_path, text_file):
    wide = {"hidden_size": 96, "intermediate_size": 192}
    model = saved(family, tmp_path / "model", dtype=torch.bfloat16, max_shard_size="50KB", **wide)
    config = replace(MATCHED, block="priced")
    from_memory, from_disk = (
        pruned_files(model, tmp_path / f"out-{stream}", text_file, config, stream) for stream in (False, True)
    )
    assert from_disk == from_memory
    assert len({layer.block for layer in inspect_folder(tmp_path / "out-True")}) > 1
    report = Report.read(tmp_path / "out-True")
    assert report.totals.bytes == sum(layer.bytes for layer in report.layers)


def test_blocks_are_on_the_meta_device_unless_they_are_at_work(model_folder, text_file, out):
    opened = open_model(str(model_folder), log=silent)
    held: list[set[int]] = []

    def look(_):
        found = enumerate(opened.weights.blocks)
        held.append({index for index, block in found if not next(block.parameters()).is_meta})

    calibration = Calibration(str(text_file), 4, 24)
    prune_to_folder(opened, out, replace(MATCHED, tail=2), calibration, observer=Stepping(look))
    assert {index for one in held for index in one} == set(range(BLOCKS))
    assert max(map(len, held)) == 2  # the tail
    assert sum(len(one) > 1 for one in held) < len(held) / 2


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_in_another_dtype(family, tmp_path, text_file):
    model = saved(family, tmp_path / "model")
    written = {}
    for stream in (False, True):
        found = (open_model if stream else load_model)(str(model), "bfloat16", log=silent)
        prune_to_folder(found, tmp_path / f"{stream}", QUICK, Calibration(str(text_file), 4, 24), observer=Silent())
        written[stream] = (tmp_path / f"{stream}" / "model.safetensors").read_bytes()
    assert written[True] == written[False]


# Tensors that transformers makes of others while it loads

MIXTURES = {"mixtral": "w1", "qwen3_moe": "gate_proj", "deepseek_v3": "gate_proj"}


DENSE = {
    "no experts": layers_alone(MATCHED, ignore=("re:.*experts",)),
    "those of one block": layers_alone(MATCHED, ignore=(r"re:model\.layers\.1\..*\.experts\.",)),
}


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        *((family, "layers alone") for family in MIXTURES),
        *((family, "no experts") for family in MIXTURES),
        ("mixtral", "blocks and tail"),
        ("deepseek_v3", "those of one block"),
    ],
)
def test_experts_stored_one_by_one(family, settings, tmp_path, text_file):
    model = saved(family, tmp_path / "model", dtype=torch.bfloat16, max_shard_size="50KB")
    assert f"experts.3.{MIXTURES[family]}.weight" in (model / "model.safetensors.index.json").read_text()
    config = {**SETTINGS, **DENSE}[settings]
    from_memory, from_disk = (
        pruned_files(model, tmp_path / str(stream), text_file, config, stream) for stream in (False, True)
    )
    assert from_disk == from_memory
    assert len(inspect_folder(tmp_path / "True")) > BLOCKS


def test_experts_a_few_at_a_time(tmp_path, text_file, monkeypatch):
    model = saved("mixtral", tmp_path / "model", dtype=torch.bfloat16)
    from_memory = pruned_files(model, tmp_path / "memory", text_file, MATCHED, stream=False)
    monkeypatch.setattr(in_process, "experts_at_once", lambda job: 1)
    assert pruned_files(model, tmp_path / "disk", text_file, MATCHED, stream=True) == from_memory


@pytest.mark.parametrize("family", MIXTURES)
def test_the_fingerprint_of_a_mixture_is_that_in_memory(family, tmp_path):
    model = saved(family, tmp_path / "model", dtype=torch.bfloat16)
    assert open_model(str(model), log=silent).fingerprint == load_model(str(model), log=silent).fingerprint


def test_a_mixture_stored_as_transformers_holds_it(tmp_path, text_file):
    tiny_model("qwen3_moe").save_pretrained(tmp_path / "model", save_original_format=False)
    word_tokenizer().save_pretrained(tmp_path / "model")
    from_memory, from_disk = (
        pruned_files(tmp_path / "model", tmp_path / str(stream), text_file, layers_alone(MATCHED), stream)
        for stream in (False, True)
    )
    assert from_disk == from_memory


EXPERT = "model.layers.1.mlp.experts.2.up_proj.weight"


def test_numbers_that_are_none_in_an_expert_are_told(tmp_path, text_file, out, monkeypatch):
    model = saved("qwen3_moe", tmp_path / "mixture")
    changed(model, lambda tensors: tensors[EXPERT].fill_(float("inf")))
    monkeypatch.setattr(workflow, "prune_job_", None)
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.experts\.gate_up_proj holds NaN or infinite values"):
        prune(model, out, text_file, stream=True)


def test_a_missing_expert_is_told(tmp_path, text_file, out):
    model = saved("mixtral", tmp_path / "mixture")
    changed(model, lambda tensors: tensors.pop("model.layers.1.block_sparse_moe.experts.2.w2.weight"))
    with pytest.raises(ValueError, match=r"holds 3 tensors of which .*experts\.down_proj is made .*: they give"):
        prune(model, out, text_file, stream=True)


def test_what_transformers_cannot_make_of_shapes_is_refused(tmp_path):
    model = saved("qwen3_moe", tmp_path / "mixture")
    changed(model, lambda tensors: tensors.pop(EXPERT))
    with pytest.raises(NotStreamable, match=r"cannot make .*1\.mlp\.experts\.gate_up_proj .*--no-stream"):
        open_model(str(model), log=silent)


def test_weights_that_blocks_share_are_pruned_around_in_memory_alone(tmp_path, text_file, out):
    sizes = {"hidden_size": 32, "attention_hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 6}
    mamba = {"n_mamba_heads": 2, "mamba_d_state": 8, "mamba_dt_rank": 4, "attn_layer_period": 2, "attn_layer_offset": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "pad_token_id": 0}
    model = tmp_path / "zamba"
    ZambaForCausalLM(ZambaConfig(vocab_size=96, **sizes, **mamba, **heads)).save_pretrained(model)
    word_tokenizer().save_pretrained(model)
    with pytest.raises(NotStreamable, match=r"shared_transf.* is .*shared_transf.* as well.*--no-stream"):
        open_model(str(model), log=silent)
    report = prune(model, out, text_file)
    assert report.layers and not any("shared_transf" in layer.name for layer in report.layers)
    assert load_pruned(out) is not None


# Killed, and continued


def run_until(at: int | None, model: Path, out: Path, text: Path) -> None:
    """Prune from disk, and be killed at a step."""
    left = at or 10**9

    def act(_):
        nonlocal left
        left -= 1
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)

    prune(model, out, text, MATCHED, observer=Stepping(act), stream=True)


def test_a_killed_run_ends_with_the_same_bits(model_folder, text_file, out, tmp_path):
    prune(model_folder, tmp_path / "whole", text_file, MATCHED)
    for at in (20, 45, 60):
        assert exit_code(begin(run_until, at, model_folder, out, text_file)) == -signal.SIGKILL
    assert exit_code(begin(run_until, None, model_folder, out, text_file)) == 0
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()
    assert names(tmp_path) == {"model", "text.txt", "pruned", "whole"}


def test_a_run_begun_in_memory_goes_on_from_disk(model_folder, text_file, out):
    prune(model_folder, out, text_file)
    assert prune(model_folder, out, text_file, stream=True) == Report.read(out)  # it is finished: the same run


# The fingerprint


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"files": 3, "dtype": "auto", "digests": {}}'])
def test_a_damaged_record_of_digests_is_made_anew(content, model_folder):
    wanted = model_fingerprint(load_model(str(model_folder), log=silent).model)
    assert open_model(str(model_folder), log=silent).fingerprint == wanted
    [record] = (cache_folder() / "digests").iterdir()
    whole = record.read_text()
    record.write_text(content)
    assert open_model(str(model_folder), log=silent).fingerprint == wanted
    assert record.read_text() == whole


def test_the_fingerprint_is_that_of_the_model_in_memory_and_read_once(model_folder, monkeypatch):
    assert open_model(str(model_folder), log=silent).fingerprint == model_fingerprint(
        load_model(str(model_folder), log=silent).model
    )
    monkeypatch.setattr(fingerprint, "tensor_digest", None)
    opened = open_model(str(model_folder), log=silent)
    assert len(opened.fingerprint) == 64
    os.utime(opened.weights.files[0], ns=(1, 1))
    with pytest.raises(TypeError):
        open_model(str(model_folder), log=silent).fingerprint  # noqa: B018 (it is read again)


def test_changed_weights_are_another_run(model_folder, text_file, out):
    prune(model_folder, out, text_file, stream=True)
    saved("llama", model_folder, seed=1)
    with pytest.raises(DifferentRun, match="model: "):
        prune(model_folder, out, text_file, stream=True)


def changed(folder: Path, change) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def test_numbers_that_are_none_are_told_before_the_work(model_folder, text_file, out, monkeypatch):
    changed(model_folder, lambda tensors: tensors["model.layers.1.mlp.up_proj.weight"].fill_(float("nan")))
    monkeypatch.setattr(workflow, "prune_job_", None)
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj\.weight holds NaN or infinite values"):
        prune(model_folder, out, text_file, stream=True)


# Refused


def test_a_missing_tensor_is_told(model_folder, text_file, out):
    changed(model_folder, lambda tensors: tensors.pop("model.layers.2.mlp.up_proj.weight"))
    with pytest.raises(
        ValueError, match=r"lacks the tensors model\.layers\.2\.mlp\.up_proj\.weight \(1 in all\): copy"
    ):
        prune(model_folder, out, text_file, stream=True)


def test_a_missing_shard_is_told(tmp_path, text_file, out):
    folder = saved("llama", tmp_path / "sharded", max_shard_size="50KB")
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ValueError, match=r"lacks model-00002-of-00003\.safetensors, which its index lists"):
        prune(folder, out, text_file, stream=True)


def test_a_pruned_model_is_refused(model_folder, text_file, out, tmp_path):
    prune(model_folder, out, text_file)
    with pytest.raises(ValueError, match="is pruned already"):
        prune(out, tmp_path / "again", text_file, stream=True)


def test_an_unknown_place_for_states_is_told(model_folder, text_file, out):
    with pytest.raises(ValueError, match="states must be one of auto, memory, disk, got 'cloud'"):
        prune(model_folder, out, text_file, states="cloud")


# Chosen by memory, and planned


@pytest.mark.parametrize(("free", "on_disk"), [(10**12, False), (10**5, True)])
def test_what_does_not_fit_into_memory_is_opened_on_disk(free, on_disk, model_folder, text_file, monkeypatch):
    monkeypatch.setattr(choosing, "available", lambda device: free)
    told: list[str] = []
    observer = Silent()
    observer.say = told.append
    found = load_to_prune(str(model_folder), QUICK, Calibration(str(text_file), 4, 24), observer=observer)
    assert isinstance(found.weights, OnDisk) == on_disk
    assert on_disk == any("decoder blocks are read from disk one at a time" in sentence for sentence in told)


@pytest.mark.parametrize("states", ["auto", "memory", "disk"])
def test_what_is_loaded_into_memory_fits_with_its_states(states, model_folder, text_file, monkeypatch):
    """At every amount of free memory around what the run takes, the run that follows is the one that was counted."""
    calibration = Calibration(str(text_file), 16, 24)
    whole = job_of(load_model(str(model_folder), log=silent), MATCHED, calibration, Silent(), states=states)
    taken, weights = memory_of(whole, spilled=states == "disk").peak, model_bytes(whole)
    chosen = set()
    for free in range(taken // 2, 2 * taken, taken // 12):
        monkeypatch.setattr(choosing, "available", lambda device, free=free: free)
        found = load_to_prune(str(model_folder), MATCHED, calibration, observer=Silent(), states=states)
        chosen.add(isinstance(found.weights, OnDisk))
        if not isinstance(found.weights, OnDisk):
            monkeypatch.setattr(jobs, "available", lambda device, free=free: free - weights)
            job = job_of(found, MATCHED, calibration, Silent(), states=states)
            assert memory_of(job).peak <= free
    assert chosen == {True, False}


def test_every_worker_takes_memory_of_its_own(model_folder, text_file, monkeypatch):
    calibration = Calibration(str(text_file), 4, 24)
    alone = memory_of(job_of(loaded(model_folder, True), QUICK, calibration, Silent()), streamed=False).peak
    monkeypatch.setattr(choosing, "available", lambda device: 2 * alone)
    for workers, on_disk in ((None, False), (8, True)):
        found = load_to_prune(str(model_folder), QUICK, calibration, observer=Silent(), workers=workers)
        assert isinstance(found.weights, OnDisk) == on_disk


def test_the_plan_of_a_model_on_disk_reads_no_block(model_folder, text_file, monkeypatch):
    opened = open_model(str(model_folder), log=silent)
    job = job_of(opened, MATCHED, Calibration(str(text_file), 4, 24), Silent())
    plan = plan_job(job)
    monkeypatch.setattr(type(opened.weights.stored), "__getitem__", None)
    assert plan_job(job).layers == plan.layers and plan.seconds > 0
    whole = plan_job(
        job_of(load_model(str(model_folder), log=silent), MATCHED, Calibration(str(text_file), 4, 24), Silent())
    )
    assert plan.layers == whole.layers and plan.model_bytes == whole.model_bytes
    assert plan.memory.weights < whole.memory.weights and plan.disk_bytes >= whole.disk_bytes
    assert plan.streamed and not whole.streamed


def test_the_index_of_a_sharded_folder_is_transformers_own(tmp_path, text_file, monkeypatch):
    from armorfact_hf.checkpoint import assembly

    model = saved("gpt2", tmp_path / "model")
    opened = loaded(model, True)
    monkeypatch.setattr(assembly, "SHARD", "60KB")
    monkeypatch.setattr(assembly.assemble, "__defaults__", ("60KB",))
    prune_to_folder(opened, tmp_path / "out", QUICK, Calibration(str(text_file), 4, 24), observer=Silent())
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    inspect_folder(tmp_path / "out")
    assert len(set(index["weight_map"].values())) > 1
