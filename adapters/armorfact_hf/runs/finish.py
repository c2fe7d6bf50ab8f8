"""The end of a run: its folder is written, verified against what is in memory, and only then the journal goes.

A folder that is there is whole: it is made under another name, inside of the journal, and renamed.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from armorfact_hf.checkpoint.assembly import assemble
from armorfact_hf.checkpoint.damage import without_way_out
from armorfact_hf.checkpoint.description import Description
from armorfact_hf.checkpoint.folder import describe_folder, save_pruned
from armorfact_hf.checkpoint.quantizer import put_layers_
from armorfact_hf.checkpoint.verify import check_headers, verify_folder
from armorfact_hf.data.load_model import Loaded
from armorfact_hf.files import flush, room_for, workshop
from armorfact_hf.model.causal_lm import CausalLM
from armorfact_hf.model.on_disk import OnDisk
from armorfact_hf.model.structure import is_linear
from armorfact_hf.observer import Observer
from armorfact_hf.pruning.resume.journal import Journal, remove_leftover
from armorfact_hf.pruning.resume.manifest import DifferentRun, check_same
from armorfact_hf.report.card import write_card
from armorfact_hf.report.page import write_report
from armorfact_hf.report.record import FILE, Report


def finish(loaded: Loaded, report: Report, out: Path, journal: Journal) -> None:
    """Write the pruned model, its tokenizer, its report and its model card to ``out``, and remove the journal.

    Of a model on disk, the finished layers are taken from the journal, and all else from its files.

    Raises:
        DiskFull: there is no room. OSError: what was written is not what is in memory. DifferentRun: somebody else made
            ``out`` meanwhile. The journal is kept then.
    """
    model = loaded.model
    needed = sum(tensor.nbytes for tensor in model.state_dict().values())
    with room_for(out, needed), workshop(journal.folder, out.name) as draft:
        if isinstance(loaded.weights, OnDisk):
            _assemble(loaded.weights, journal, draft)
            if loaded.tokenizer is not None:
                loaded.tokenizer.save_pretrained(draft)
        else:
            save_pruned(model, draft, loaded.tokenizer)
        write_report(report, draft)
        flush(draft)
        _check_written(draft, model, out)
        write_card(draft)
        if out.exists():
            raise DifferentRun(f"{out} was made by somebody else meanwhile: remove it, and the same call writes it")
        draft.rename(out)
    journal.remove()


def _assemble(weights: OnDisk, journal: Journal, draft: Path) -> None:
    finished = journal.tensors()
    layers = weights.model.hf_quantizer.quantization_config.description.modules.values()
    members = {
        f"{layer.name}.{part}": [f"{member}.{part}" for member in layer.members]
        for layer in layers
        if layer.experts is not None
        for part in (*layer.tensors, "bias")
    }
    # A head tied to the embedding is pruned in memory.
    empty = (x for x in layers if x.experts is not None or is_linear(weights.model.get_submodule(x.name)))
    put_layers_(weights.model, empty, weights.model.dtype)

    def read(name: str) -> Tensor:
        if name in members:
            return torch.stack([read(member) for member in members[name]])
        if name not in finished:
            return weights.read(name)
        with safe_open(finished[name], "pt") as stored:
            return stored.get_tensor(name)

    assemble(weights.model, draft, read)


def _check_written(draft: Path, model: CausalLM, out: Path) -> None:
    """The digests in memory were taken from the model, those of the files are taken now."""
    try:
        description = describe_folder(draft)
        if description != Description.from_dict(model.config.quantization_config.to_dict(), "the model"):
            raise ValueError("config.json describes another model")
        verify_folder(draft, description)
    except ValueError as error:
        raise OSError(
            f"{out} was not written as it is in memory ({without_way_out(error)}): check the disk; what is finished is "
            "kept, and the same call writes it again"
        ) from error


def journal_of(out: Path) -> Path:
    """The folder in which the run stands that writes ``out``."""
    return out.with_name(f"{out.name}.journal")


def refuse_unfinished(out: Path) -> None:
    """Raise DifferentRun if ``out`` is there and no folder that a run has finished."""
    if out.exists() and not (out / FILE).exists():
        raise DifferentRun(f"{out} exists and is no folder that armorfact finished: name another, or remove it")


def found_finished(out: Path, tokenizer: Any, manifest: Mapping[str, object], observer: Observer) -> Report:
    """The report of a finished folder; what a kill left of its journal is removed.

    Raises:
        DifferentRun: it is of another run than the manifest's. ValueError: it is not whole.
    """
    report = Report.read(out)
    check_same(report.manifest, manifest, out)
    _check_whole(out, tokenizer)
    remove_leftover(journal_of(out), manifest)
    observer.say(f"{out} is finished already.")
    return report


def _check_whole(out: Path, tokenizer: Any) -> None:
    """Check that a finished folder holds all its files, by their names and headers; loading reads the rest."""
    try:
        check_headers(out, describe_folder(out))
        if tokenizer is not None and not (out / "tokenizer_config.json").is_file():
            raise ValueError("it lacks tokenizer_config.json")
    except ValueError as error:
        raise ValueError(
            f"{out} is not whole ({without_way_out(error)}): remove it, and the same call makes it"
        ) from error
