"""Where models come from: folders, the hub, or the packages that carry the demo ones."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import cached_file

from armorfact_hf.checkpoint.config_file import CONFIG
from armorfact_hf.checkpoint.description import NotPruned
from armorfact_hf.checkpoint.fingerprint import disk_fingerprint, model_fingerprint
from armorfact_hf.checkpoint.folder import (
    ADAPTER,
    config_told,
    describe_folder,
    foreign_code_told,
    load_pruned,
    local_folder,
    refuse_missing,
    stored_tensors,
)
from armorfact_hf.data.demo_models import DEMO_MODELS, fetch_model
from armorfact_hf.data.open_on_disk import open_on_disk
from armorfact_hf.data.origin import DEMO
from armorfact_hf.model.causal_lm import CausalLM
from armorfact_hf.model.on_disk import OnDisk, Weights
from armorfact_hf.observer import Log

DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")


@dataclass(frozen=True)
class Loaded:
    """A model, its tokenizer, and the name under which it was asked for.

    Args:
        weights: those of the model; without them, all are in memory.
    """

    name: str
    model: CausalLM
    tokenizer: Any
    weights: Weights | None = None
    _hashed: dict[tuple, str] = field(default_factory=dict, repr=False, compare=False)

    @property
    def fingerprint(self) -> str:
        """The sha256 of the model, read again only if one of its tensors was replaced or changed in place."""
        if isinstance(self.weights, OnDisk):
            return disk_fingerprint(self.weights)
        held = self.model.state_dict()
        versions = tuple((name, tensor.data_ptr(), tensor._version) for name, tensor in held.items())
        if versions not in self._hashed:
            self._hashed.clear()
            self._hashed[versions] = model_fingerprint(self.model)
        return self._hashed[versions]

    @property
    def bos(self) -> int | None:
        """The token that the tokenizer puts before a text, if it does."""
        found = self.tokenizer("a")["input_ids"]
        bos = self.tokenizer.bos_token_id
        return bos if bos is not None and found and found[0] == bos else None

    def refuse_other_than(self, fingerprint: str) -> None:
        """Raise ValueError if a dense model is no longer the one of that fingerprint, which was pruned."""
        if self.fingerprint != fingerprint:
            raise ValueError(f"{self.name} is not the model that was pruned: its weights have changed since")

    def window(self, wanted: int) -> int:
        """``wanted`` tokens, or fewer where the model was trained for fewer."""
        return min(wanted, getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or wanted)


def load_model(name: Path | str, dtype: str = "auto", device: str | None = None, log: Log = print) -> Loaded:
    """A causal language model and its tokenizer, dense or pruned by armorfact.

    No code of a checkpoint is run, and only safetensors files are read.

    Args:
        name: a folder; "demo:smollm2" and the like, which package indexes carry; or a name on the hub.
        dtype: of the weights: "auto" is the one they are stored in.
        device: "cuda", "cpu", …; None is "cuda" where there is one.
        log: called with a sentence for each slow step.

    Raises:
        ValueError: an unknown name or dtype, a device that is not there, a folder without model or tokenizer, a damaged
            file (it is named).
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    place, name = device_of(device), str(name)
    where = _folder_or_hub_name(name, log)
    if Path(where).is_dir():
        check_files(Path(where))
    pruned = _is_pruned(where)
    _check_config(where)
    tokenizer = _tokenizer(where)  # which takes no time, and may be missing
    if pruned:
        model = load_pruned(where, place, None if dtype == "auto" else getattr(torch, dtype))
    else:
        model = _dense_model(where, dtype).to(place)
    # A folder is remembered by its whole path, so that it is found again from elsewhere.
    known_as = name if name.startswith(DEMO) else where
    return Loaded(known_as, model.eval(), tokenizer)


def open_model(name: str, dtype: str = "auto", device: str | None = None, log: Log = print) -> Loaded:
    """As `load_model`, of a dense model whose decoder blocks stay on disk until they are worked with.

    Raises:
        NotStreamable: the model can only be loaded as a whole.
        ValueError: see `load_model`; or the model is pruned already.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    place = device_of(device)
    where = _folder_or_hub_name(name, log)
    folder = local_folder(where)
    check_files(folder)
    try:
        describe_folder(folder)
    except NotPruned:
        _check_config(where)
        tokenizer = _tokenizer(where)
        try:
            weights = open_on_disk(folder, dtype, place)
        except OSError as error:
            raise ValueError(f"cannot load the model {where!r}: {error}") from error
        return Loaded(name if name.startswith(DEMO) else where, weights.model, tokenizer, weights)
    raise ValueError(f"the model is pruned already ({where}); load the dense model again")


def device_of(name: str | None) -> torch.device:
    """The device of that name, once something could be put on it."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        first = str(error).partition("\n")[0]
        raise ValueError(f"device {name!r} cannot be used here ({first}): take 'cpu', or leave it out") from error
    if device.type == "meta":
        raise ValueError("device 'meta' holds no numbers: take 'cpu' or 'cuda', or leave it out")
    return device


def _folder_or_hub_name(name: str, log: Log) -> str:
    if name.startswith(DEMO):
        known = ", ".join(DEMO + key for key in DEMO_MODELS)
        if name.removeprefix(DEMO) not in DEMO_MODELS:
            raise ValueError(f"unknown demo model {name!r}: expected one of {known}")
        return str(fetch_model(name.removeprefix(DEMO), log))
    if name and Path(name).is_dir():
        return str(Path(name).resolve())
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        return name
    raise ValueError(
        f"{name!r} is no folder, no name on the hub (they look like 'owner/name'), and no demo model "
        f"({', '.join(DEMO + key for key in DEMO_MODELS)})"
    )


def check_files(folder: Path) -> None:
    """Read every tensor's place in a model folder.

    Raises:
        ValueError: no config.json, no safetensors file, or one that is missing or damaged.
    """
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} holds no model (it has no config.json): name a folder that `save_pretrained` wrote")
    for _ in stored_tensors(folder):
        pass


def _is_pruned(where: str) -> bool:
    """Whether a model, in a folder or on the hub, is pruned; its config is read strictly."""
    try:
        config = cached_file(where, CONFIG)
        cached_file(where, ADAPTER, _raise_exceptions_for_missing_entries=False)  # is refused where there is one
        describe_folder(Path(config).parent if config else Path(where))
    except NotPruned:
        return False
    except OSError as error:
        raise ValueError(f"cannot load the model {where!r}: {error}") from error
    return True


def _check_config(where: str) -> None:
    """Raise ValueError if a config is of no causal language model that transformers knows."""
    with config_told(where), foreign_code_told(where):
        config = AutoConfig.from_pretrained(where, trust_remote_code=False)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(f"{where} holds no causal language model (its config is a {type(config).__name__}): name one")


def _dense_model(where: str, dtype: str) -> CausalLM:
    with config_told(where), foreign_code_told(where):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            where, dtype=dtype, use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
    model, found = loaded
    refuse_missing(where, found["missing_keys"])  # transformers makes them at random, and only warns
    return model


def _tokenizer(where: str) -> Any:
    try:
        with foreign_code_told(where):
            return AutoTokenizer.from_pretrained(where, trust_remote_code=False)
    except Exception as error:  # what reads the files of a tokenizer raises even that
        raise ValueError(
            f"{where} has no tokenizer that transformers can load ({' '.join(str(error).split())}): put its files "
            "there, with the tokenizer's `save_pretrained`"
        ) from error
