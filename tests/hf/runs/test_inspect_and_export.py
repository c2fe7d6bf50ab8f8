"""Looking inside of a finished folder, and out of it again to an ordinary model."""

from __future__ import annotations

import json
import logging
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from armorfact_hf.checkpoint.description import NotPruned
from armorfact_hf.checkpoint.folder import load_pruned, stored_tensors
from armorfact_hf.files import DiskFull
from armorfact_hf.pruning.resume.manifest import DifferentRun
from armorfact_hf.runs import export as exporting
from armorfact_hf.runs.export import export_dense
from armorfact_hf.runs.inspect import inspect_folder
from tests.hf.models import random_tokens, tiny_model
from tests.hf.processes import begin, exit_code
from tests.hf.runs.folders import OURS, names, nbytes, prune, saved, silent

pytestmark = pytest.mark.usefixtures("own_cache")


def test_every_layer_is_listed_with_its_bytes_on_disk(tmp_path, text_file, out):
    model = saved("gpt2", tmp_path / "gpt2")
    report = prune(model, out, text_file, OURS)
    held = {layer.name: layer for layer in inspect_folder(out)}
    assert set(held) == {layer.name for layer in report.layers}
    stored, dense = dict(stored_tensors(out)), dict(stored_tensors(model))
    for layer in report.layers:
        name, found = layer.name, held[layer.name]
        parts = [f"{name}.{part}" for part in ("values", "positions", "left", "right")]
        assert found.bytes == layer.bytes == sum(stored[part].nbytes for part in parts)
        assert found.dense_bytes == layer.dense_bytes == dense[f"{name}.weight"].nbytes
        assert found.shape == tuple(dense[f"{name}.weight"].T.shape) == tuple(layer.shape)
        assert (found.loss, found.sparsegpt_loss) == (layer.losses["armorfact"], layer.losses["sparsegpt"])
        assert found.block == tuple(layer.block) == (stored[parts[2]].shape[-1], stored[parts[3]].shape[-1])


def test_layers_are_listed_in_the_order_of_the_model(model_folder, text_file, out):
    report = prune(model_folder, out, text_file)
    assert [layer.name for layer in inspect_folder(out)] == [layer.name for layer in report.layers]


def test_a_folder_without_report_is_listed_without_losses(model_folder, text_file, out):
    prune(model_folder, out, text_file)
    (out / "report.json").unlink()
    assert {(layer.loss, layer.sparsegpt_loss) for layer in inspect_folder(out)} == {(None, None)}


@pytest.mark.parametrize("head", [False, True], ids=["blocks", "and head"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_an_exported_folder_is_an_ordinary_model_of_the_same_logits(family, head, text_file, out, tmp_path, caplog):
    model = saved(family, tmp_path / family)
    prune(model, out, text_file, replace(OURS, head=head))
    dense = tmp_path / "dense"
    export_dense(out, dense, silent)
    assert names(dense) == names(model)
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    loaded, info = AutoModelForCausalLM.from_pretrained(dense, output_loading_info=True)
    logger.removeHandler(caplog.handler)
    assert not caplog.records and not any(info.values())
    assert [type(module) for module in loaded.modules()] == [type(module) for module in tiny_model(family).modules()]
    if not head:
        assert nbytes(dense) == nbytes(model)
        assert config_of(dense) == config_of(model)
    tokens = random_tokens()
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens).logits, load_pruned(out)(tokens).logits, rtol=1e-5, atol=1e-5)
    assert AutoTokenizer.from_pretrained(dense)("w5 w3")["input_ids"] == [5, 3]


def config_of(folder: Path) -> dict:
    return {key: value for key, value in AutoConfig.from_pretrained(folder).to_dict().items() if key != "_name_or_path"}


def test_an_export_that_somebody_was_faster_than_is_told(model_folder, text_file, out, tmp_path, monkeypatch):
    prune(model_folder, out, text_file)
    dense = tmp_path / "dense"
    monkeypatch.setattr(exporting, "flush", lambda _: dense.mkdir())
    with pytest.raises(FileExistsError, match="made by somebody else meanwhile"):
        export_dense(out, dense, silent)
    assert names(dense) == set() and not {f"{dense.name}.journal"} & names(tmp_path)


def test_what_a_killed_export_left_goes_with_the_next(model_folder, text_file, out, tmp_path):
    prune(model_folder, out, text_file)
    dense, place = tmp_path / "dense", tmp_path / "dense.journal"
    left = place / ".dense-abc.part" / "dense"
    left.mkdir(parents=True)
    for path in (left / "model.safetensors", place / "lock", place / "writer.json"):
        path.touch()
    export_dense(out, dense, silent)
    assert names(dense) == names(model_folder) and not place.exists()


def test_an_export_touches_no_folder_of_others(model_folder, text_file, out, tmp_path):
    prune(model_folder, out, text_file)
    place = tmp_path / "dense.journal"
    place.mkdir()
    for name in ("chapter.txt", ".notes.part"):
        (place / name).touch()
    with pytest.raises(DifferentRun, match=r"dense\.journal exists and holds no journal of armorfact"):
        export_dense(out, tmp_path / "dense", silent)
    assert names(place) == {"chapter.txt", ".notes.part"}


def test_one_process_exports_to_a_folder(model_folder, text_file, out, tmp_path, monkeypatch):
    prune(model_folder, out, text_file)

    def meanwhile(folder):
        other = begin(export_dense, out, tmp_path / "dense", says=tmp_path / "said")
        assert exit_code(other) == 1

    monkeypatch.setattr(exporting, "flush", meanwhile)
    export_dense(out, tmp_path / "dense", silent)
    assert f"dense.journal is being written by process {os.getpid()}" in (tmp_path / "said").read_text()


@pytest.mark.parametrize(("number", "error"), [(28, DiskFull), (5, OSError)])
def test_an_export_that_cannot_be_written_is_told(number, error, model_folder, text_file, out, tmp_path, monkeypatch):
    prune(model_folder, out, text_file)

    def fail(*_, **__):
        raise SafetensorError(f"Error while serializing: I/O error: (os error {number})")

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", fail)
    with pytest.raises(error, match="dense could not be written: "):
        export_dense(out, tmp_path / "dense", silent)
    assert names(tmp_path) == {"model", "pruned", "text.txt"}


def test_an_export_takes_the_place_of_nothing(model_folder, text_file, out, tmp_path):
    prune(model_folder, out, text_file)
    before = (model_folder / "model.safetensors").read_bytes()
    with pytest.raises(FileExistsError, match="model exists already: name a new folder"):
        export_dense(out, model_folder, silent)
    assert (model_folder / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("look", [inspect_folder, lambda folder: export_dense(folder, folder / "dense", silent)])
def test_folders_that_hold_no_pruned_model_are_told_so(look, model_folder, tmp_path):
    with pytest.raises(NotPruned, match="model holds no model pruned by armorfact; `armorfact prune` makes one"):
        look(model_folder)
    for folder in (tmp_path / "nothing", tmp_path):
        with pytest.raises(NotPruned, match=re.escape(str(folder))):
            look(folder)


def test_a_pruned_folder_that_lacks_a_layer_is_told(model_folder, text_file, out):
    prune(model_folder, out, text_file)
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"]["modules"].append({"name": "model.layers.9.x", "shape": [4, 4], "block": None})
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"lack model\.layers\.9\.x\.values"):
        inspect_folder(out)
