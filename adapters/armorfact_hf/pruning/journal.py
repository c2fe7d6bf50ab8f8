"""The finished decoder blocks of a run, on disk: what a killed run resumes from.

One safetensors file a block holds the tensors of its pruned layers, and in its header the reports, its own name, the
run that it belongs to and a digest over all of it; `manifest.json` says which model, settings and calibration tokens
that run is about. Files are written beside their target and renamed, so a file that is there is whole. One process
writes at a time.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from filelock import BaseFileLock
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from armorfact import Pattern
from armorfact_hf.checkpoint.description import Description, digests, tensor_digest
from armorfact_hf.checkpoint.verify import verify
from armorfact_hf.files import is_draft, remove, room_for, written_beside
from armorfact_hf.layers.format import LayerFormat
from armorfact_hf.layers.linear import FactorizedLinear
from armorfact_hf.pruning.layer import LayerReport
from armorfact_hf.pruning.lock import LOCK, WRITER, InUse, lock, unlock
from armorfact_hf.pruning.matching import BlockReport
from armorfact_hf.pruning.seal import BLANK, check_seal, seal

MANIFEST = "manifest.json"
BLOCK = re.compile(r"(head|tail|state|[a-z]+-\d{4,})\.safetensors")  # names of files that hold finished work
DAMAGE = (SafetensorError, OSError, LookupError, TypeError, AttributeError, RuntimeError, ArithmeticError, ValueError)
Pruned = list[tuple[FactorizedLinear, LayerReport]]


@dataclass(frozen=True)
class Finished:
    """The pruned layers of a decoder block with their reports, the seconds that they took, and how it was tuned."""

    layers: Pruned
    seconds: float
    matched: BlockReport | None = None


class DifferentRun(ValueError):
    """A folder holds the work of another run; the message says what differs."""


@dataclass(frozen=True)
class Journal:
    """The folder of one run, of which this process is the only writer until the journal is closed.

    Args:
        folder: holds the manifest and a file for each finished block.
        pattern: the N:M pattern of the run.
        run: the digest of the manifest.
        held: the lock.
    """

    folder: Path
    pattern: Pattern
    run: str
    held: BaseFileLock

    @classmethod
    def open(cls, folder: Path, manifest: Mapping[str, Any], pattern: str | Pattern) -> Journal:
        """Start a journal in ``folder``, or continue the one that is there.

        Leave it with `close`, or as a context manager.

        Raises:
            DifferentRun: the folder belongs to a run with another manifest, or is none of armorfact's.
            InUse: another process is at it.
        """
        _refuse_foreign(folder)
        held = lock(folder)
        try:
            _begin(folder, manifest)
            return cls(folder, Pattern.parse(pattern), _digest(manifest), held)
        except BaseException:
            unlock(held)
            raise

    def close(self) -> None:
        """Let others continue."""
        unlock(self.held)

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def remove(self) -> None:
        """Remove all of the journal but its lock, which `close` takes away with the folder.

        The manifest goes last, so that whatever a kill leaves is known as a journal.
        """
        _clear(self.folder)

    def write(self, key: str, finished: Finished) -> None:
        """Store a finished block under ``key``: "head", "tail", or a word and a number such as "block-0003".

        Raises:
            DiskFull: the disk has no room for it.
        """
        tensors = {
            f"{report.name}.{name}": tensor.contiguous()
            for layer, report in finished.layers
            for name, tensor in layer.state_dict().items()
        }
        reports = [report.to_dict() for _, report in finished.layers]
        matched = None if finished.matched is None else asdict(finished.matched)
        about = {"key": key, "run": self.run, "seconds": finished.seconds, "reports": reports, "matched": matched}
        block = json.dumps(about)
        path = self._path(key)
        with room_for(path, sum(tensor.nbytes for tensor in tensors.values())), written_beside(path) as draft:
            save_file(tensors, draft, metadata={"block": block, **BLANK})
            seal(draft)

    def read(self, key: str, device: Any = None) -> Finished | None:
        """The block stored under ``key``, or None.

        Raises:
            ValueError: the file is damaged, or another than what was written under this key in this run.
        """
        path = self._path(key)
        if not path.exists():
            return None
        with _told(path):
            check_seal(path)
            return self._read(path, key, device)

    def tensors(self) -> dict[str, Path]:
        """The file of every tensor of the finished layers, by name; what was tuned last counts.

        Raises:
            ValueError: see `read`.
        """
        found: dict[str, Path] = {}
        for path in sorted(path for path in _held(self.folder) if BLOCK.fullmatch(path.name)):  # a tail after blocks
            with _told(path):
                check_seal(path)
                with safe_open(path, "pt") as stored:
                    found |= dict.fromkeys(stored.keys(), path)
        return found

    def _read(self, path: Path, key: str, device: Any) -> Finished:
        with safe_open(path, "pt") as stored:
            block = json.loads(stored.metadata()["block"])
            self._check_place(block, key)
            reports = [_report(values) for values in block["reports"]]
            formats = {x.name: self._format(stored, x) for x in reports}
            if left_over := [name for name in sorted(stored.keys()) if name.rpartition(".")[0] not in formats]:
                raise ValueError(f"it holds {', '.join(left_over)}, of which it has no report")
            verify([path], Description(self.pattern, "float32", formats, {}))
            layers = [(_layer(stored, formats[report.name], device), report) for report in reports]
            return Finished(layers, float(block["seconds"]), _matched(block["matched"]))

    def _check_place(self, block: Mapping[str, Any], key: str) -> None:
        if block["run"] != self.run:
            raise ValueError("it is of another run")
        if block["key"] != key:
            raise ValueError(f"it is {block['key']} under another name")

    def _format(self, stored: Any, report: LayerReport) -> LayerFormat:
        """Blocks of the tail are rounded after they were kept for the first time, so the file says what it holds."""
        values = f"{report.name}.values"
        whole = values in stored.keys() and stored.get_slice(values).get_dtype() == "I8"  # noqa: SIM118
        return LayerFormat(report.name, report.shape, self.pattern, report.block, core_dtype="int8" if whole else None)

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"


def _layer(stored: Any, layout: LayerFormat, device: Any) -> FactorizedLinear:
    prefix = f"{layout.name}."
    names = [name.removeprefix(prefix) for name in stored.keys() if name.startswith(prefix)]  # noqa: SIM118
    tensors = {name: stored.get_tensor(prefix + name) for name in names}
    dtype = tensors.get("left", tensors["values"]).dtype
    layer = FactorizedLinear.empty(layout, "bias" in tensors, dtype, device)
    # Copied into memory of PyTorch's own: aligned as in a run without interruption, and so the same bits.
    layer.load_state_dict(tensors)
    return layer


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """Whatever reading a damaged file ends with becomes one error, with a sentence."""
    try:
        yield
    except DAMAGE as error:
        what = str(error).partition(": copy or download")[0]  # there is a nearer way out
        raise ValueError(
            f"{path} is damaged ({what}); delete that one file, and its decoder block is pruned again"
        ) from error


def remove_leftover(folder: Path) -> None:
    """Remove a journal that nobody needs any more; one that is in use or holds foreign files is left alone."""
    if folder.is_dir() and all(map(_is_ours, _held(folder))):
        with suppress(InUse):
            held = lock(folder)
            _clear(folder)
            unlock(held)


def _begin(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Make the folder one of this run, without what kills left in it."""
    path = folder / MANIFEST
    if path.exists():
        check_same(_read_manifest(path), manifest, folder)
        for draft in filter(is_draft, _held(folder)):
            remove(draft)
    else:
        _clear(folder)
        with written_beside(path) as draft:
            draft.write_text(json.dumps(manifest, indent=2), encoding="utf-8")


def _clear(folder: Path) -> None:
    """Remove what is ours, the manifest last; for the writer."""
    for path in _held(folder):
        if _is_ours(path) and path.name not in (MANIFEST, LOCK, WRITER):
            remove(path)
    remove(folder / MANIFEST)


def _refuse_foreign(folder: Path) -> None:
    if not (folder / MANIFEST).exists() and not all(map(_is_ours, _held(folder))):
        raise DifferentRun(f"{folder} exists and holds no journal of armorfact: name another, or remove it")


def _held(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except FileNotFoundError:
        return []


def _is_ours(path: Path) -> bool:
    return path.name in (MANIFEST, LOCK, WRITER) or is_draft(path) or BLOCK.fullmatch(path.name) is not None


def _digest(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _report(values: dict[str, Any]) -> LayerReport:
    block = values["block"]
    return LayerReport(
        **values
        | {
            "shape": tuple(values["shape"]),
            "block": None if block is None else tuple(block),
            "notes": tuple(values["notes"]),
        }
    )


def _matched(values: dict[str, Any] | None) -> BlockReport | None:
    return None if values is None else BlockReport(**values | {"notes": tuple(values["notes"])})


def _read_manifest(path: Path) -> Mapping[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError(f"expected a dictionary, got {type(found).__name__}")
        return found
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); delete its folder, and start again") from error


def check_same(stored: Mapping[str, Any], wanted: Mapping[str, Any], folder: Path) -> None:
    """Refuse to mix two runs.

    Raises:
        DifferentRun: names each entry that differs, with both values.
    """
    differing = [
        f"{key}: {_short(stored.get(key))} there, {_short(wanted.get(key))} now"
        for key in sorted({*stored, *wanted})
        if stored.get(key) != wanted.get(key)
    ]
    if differing:
        raise DifferentRun(
            f"{folder} belongs to another run ({'; '.join(differing)}). Give that run's arguments to continue it, "
            "name another output folder, or delete this one"
        )


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:36]}…"


def flat_manifest(config: Mapping[str, Any], **others: Any) -> dict[str, Any]:
    """A manifest with one entry for every setting, so that a difference can be named."""
    return {**{f"config.{key}": value for key, value in config.items()}, **others}


def model_fingerprint(model: nn.Module) -> str:
    """The sha256, in hexadecimal, over names, dtypes, shapes and bytes of all tensors of a model."""
    return fingerprint_of(digests(model.state_dict()))


def fingerprint_of(tensors: Mapping[str, str]) -> str:
    """The same, from the `tensor_digest` of each tensor."""
    lines = (f"{name} {digest}\n" for name, digest in sorted(tensors.items()))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def tokens_fingerprint(tokens: Tensor) -> str:
    """The sha256, in hexadecimal, of token numbers."""
    return tensor_digest(tokens.to(torch.int64))
