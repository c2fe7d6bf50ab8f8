"""Short runs into folders, and what is in these."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from armorfact_hf.checkpoint.folder import stored_tensors
from armorfact_hf.data.calibration import Calibration
from armorfact_hf.data.load_model import Loaded, load_model, open_model
from armorfact_hf.pruning.config import PruneConfig
from armorfact_hf.runs.prune_to_folder import prune_to_folder
from tests.hf.models import tiny_model, word_tokenizer
from tests.hf.observers import Silent

OURS = PruneConfig(sweeps=1)
QUICK = PruneConfig(method="wanda", baselines=())


def silent(sentence: str) -> None:
    """Where sentences go."""


def prune(model: Path | str, out: Path, text: Path | str, config: PruneConfig = QUICK, **more):
    return prune_to_folder(str(model), out, config, Calibration(str(text), 4, 24), **{"observer": Silent()} | more)


def saved(family: str, folder: Path, **changes) -> Path:
    """A folder with a tiny model and its tokenizer."""
    shard_size = changes.pop("max_shard_size", "1GB")
    tiny_model(family, **changes).save_pretrained(folder, max_shard_size=shard_size)
    word_tokenizer().save_pretrained(folder)
    return folder


def loaded(model: Path, stream: bool) -> Loaded:
    """The model; with a tokenizer of words, which transformers replaces by its own for some families."""
    found = (open_model if stream else load_model)(str(model), log=silent)
    return replace(found, tokenizer=word_tokenizer())


def pruned_files(model: Path, out: Path, text: Path, config: PruneConfig, stream: bool, **more) -> dict[str, bytes]:
    """What is written but for the report, which holds times."""
    calibration = Calibration(str(text), 4, 24)
    prune_to_folder(loaded(model, stream), out, config, calibration, observer=Silent(), **more)
    return {path.name: path.read_bytes() for path in out.iterdir() if path.suffix in (".safetensors", ".json")} | {
        "report.json": b""
    }


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def nbytes(folder: Path) -> int:
    return sum(tensor.nbytes for _, tensor in stored_tensors(folder))
