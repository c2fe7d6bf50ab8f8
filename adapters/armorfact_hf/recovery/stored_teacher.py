"""A teacher on disk: the likeliest words that a model says at every position of a text.

A folder holds a manifest, which says of which model it is, and one file for every window of the text, named by the
sha256 of its token numbers. What a killed run left is used by the next; windows of several texts may lie side by side.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import armorfact
from armorfact_hf.checkpoint.fingerprint import config_fingerprint, model_fingerprint, tokens_fingerprint
from armorfact_hf.files import is_draft, remove
from armorfact_hf.model.token_divergence import POSITIONS_AT_ONCE, BodyAndHead
from armorfact_hf.observer import Observer, Step
from armorfact_hf.pruning.checks import checked_tokens, refuse_pruned
from armorfact_hf.pruning.resume.lock import lock, unlock
from armorfact_hf.pruning.resume.manifest import (
    MANIFEST,
    check_same,
    digest_of,
    read_manifest,
    refuse_foreign,
    write_manifest,
)
from armorfact_hf.pruning.resume.seal import open_sealed, save_sealed
from armorfact_hf.recovery.top_tokens import TopTokens

KIND = "likeliest"  # an entry that no other manifest has


class StoredTeacher:
    """What `store_teacher` left in a folder; it takes the place of the model in `recover_`.

    Attributes:
        vocabulary: of the model. likeliest: how many words of each position there are.
        fingerprint: says which model it was, and how many words of it are kept.

    Raises:
        ValueError: the folder holds no such thing.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        if not (self.folder / MANIFEST).exists():
            raise ValueError(f"{self.folder} holds no words of a teacher: write them with `armorfact teach`")
        manifest = read_manifest(self.folder)
        if KIND not in manifest:
            raise ValueError(f"{self.folder} belongs to another run: `armorfact teach` writes the words of a teacher")
        for name in ("vocabulary", KIND):
            if type(manifest.get(name)) is not int:
                raise ValueError(f"{self.folder / MANIFEST} is damaged: write the words again with `armorfact teach`")
        self.vocabulary, self.likeliest = int(manifest["vocabulary"]), int(manifest[KIND])
        self.fingerprint = digest_of(manifest)

    @staticmethod
    def found_in(folder: Path | str) -> bool:
        """Whether a folder holds the words of a teacher."""
        return (Path(folder) / MANIFEST).exists() and KIND in read_manifest(Path(folder))

    def check(self, tokens: Tensor) -> None:
        """Make sure that all windows are there and whole.

        Args:
            tokens: (windows, length).

        Raises:
            ValueError: some are not.
        """
        missing = sum(not self.has(window) for window in tokens)
        if missing:
            raise ValueError(
                f"{self.folder} lacks {missing} of the {len(tokens)} windows of the text: give `armorfact teach` the "
                "same text, windows and length; it adds what is missing"
            )
        for window in tokens:
            self.recall(window)

    def recall(self, window: Tensor) -> TopTokens:
        """See `Teacher`.

        Raises:
            ValueError: the file is damaged, or not there.
        """
        with open_sealed(self._path(window), "`armorfact teach` writes it again") as stored:
            if stored.metadata()["teacher"] != self.fingerprint:
                raise ValueError("it is of another teacher")
            words, logs, rest = (stored.get_tensor(name) for name in ("words", "logs", "rest"))
            self._check(words, logs, rest, len(window))
            return TopTokens.from_tensors(words, logs, rest)

    def _check(self, words: Tensor, logs: Tensor, rest: Tensor, length: int) -> None:
        shapes = [tuple(tensor.shape) for tensor in (words, logs, rest)]
        if shapes != [(length, self.likeliest), (length, self.likeliest), (length,)]:
            raise ValueError(f"expected {self.likeliest} words at each of {length} positions, got shapes {shapes}")
        if words.is_floating_point() or words.min() < 0 or words.max() >= self.vocabulary:
            raise ValueError(f"it holds words that are not among the {self.vocabulary} of the vocabulary")
        if not (logs.isfinite().all() and rest.isfinite().all()):
            raise ValueError("it holds probabilities that are NaN or zero")

    def distribution(self, window: Tensor, part: slice, recalled: TopTokens) -> TopTokens:
        """See `Teacher`: divergences are of the likeliest words and all others together, never above the whole ones."""
        return recalled.at(part)

    def has(self, window: Tensor) -> bool:
        """Whether a window (length,) is there."""
        return self._path(window).exists()

    def keep(self, window: Tensor, found: TopTokens) -> None:
        """Store what a teacher recalls of a window.

        Raises:
            DiskFull: the disk has no room for it.
        """
        tensors = {name: tensor.contiguous().cpu() for name, tensor in found.tensors.items()}
        save_sealed(tensors, self._path(window), {"teacher": self.fingerprint})

    def _path(self, window: Tensor) -> Path:
        return self.folder / f"{tokens_fingerprint(window.cpu())}.safetensors"


def check_teacher(model: nn.Module) -> None:
    """Raise ValueError if a dense model cannot teach because some of it is not in memory."""
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError(
            "tensors of the teacher are on the meta device (offloaded): load it whole, or let `armorfact teach` write "
            "its words down on a machine that holds it"
        )


def missing_windows(folder: Path, tokens: Tensor) -> int:
    """How many windows of a text (windows, length) are still to be written into a folder, which need not exist yet."""
    if not StoredTeacher.found_in(folder):
        return len(tokens)
    stored = StoredTeacher(folder)
    return sum(not stored.has(window) for window in tokens)


@torch.no_grad()
def store_teacher(
    model: nn.Module, tokens: Any, folder: Path | str, likeliest: int = 128, observer: Observer | None = None
) -> StoredTeacher:
    """Write the likeliest words that a model says at each position of a text, to be its stand-in for `recover_`.

    Recovery then needs no teacher in memory, and no pass through it a step. A position takes 6 bytes a word: 128 words
    of 400,000 tokens are 0.3 GB.

    Args:
        model: a causal language model on any device; it is put into evaluation mode.
        tokens: (windows, length) integer token numbers.
        folder: of its own. Windows that are in it already, from a run that was killed or of another text, stay.
        likeliest: how many words of each position are kept.
        observer: told of every window.

    Raises:
        ValueError: a pruned model, tokens that are no matrix of numbers in the vocabulary, a number of words that the
            vocabulary does not have, NaN or infinite logits. DifferentRun: the folder holds something else. InUse:
            another process writes to it. DiskFull: in mid-run; what is finished stays.
    """
    folder, observer = Path(folder), observer or Observer()
    refuse_pruned(model)
    check_teacher(model)
    teacher, tokens = BodyAndHead(model.eval()), checked_tokens(model, tokens)
    if not 1 <= likeliest <= teacher.vocabulary:
        raise ValueError(f"expected 1 to {teacher.vocabulary} likeliest words, got {likeliest}")
    refuse_foreign(folder, "words of a teacher")
    held = lock(folder)
    try:
        stored = _begun(folder, teacher, likeliest)
        for index, window in enumerate(tokens):
            observer.step(Step(index, len(tokens), "asking the teacher"))
            if not stored.has(window):
                stored.keep(window, _likeliest(teacher, window, likeliest))
        observer.step(Step(len(tokens), len(tokens), "the teacher's words are stored"))
        return stored
    finally:
        unlock(held)


def _begun(folder: Path, teacher: BodyAndHead, likeliest: int) -> StoredTeacher:
    """The folder, of this teacher and without what kills left half written; for the writer."""
    manifest = {
        "teacher": model_fingerprint(teacher.model),
        "teacher_config": config_fingerprint(teacher.model),
        KIND: likeliest,
        "vocabulary": teacher.vocabulary,
        "armorfact": armorfact.__version__,
    }
    if (folder / MANIFEST).exists():
        check_same(read_manifest(folder), manifest, folder)
    for path in filter(is_draft, list(folder.iterdir())):
        remove(path)
    if not (folder / MANIFEST).exists():
        write_manifest(folder, manifest)
    return StoredTeacher(folder)


def _likeliest(teacher: BodyAndHead, window: Tensor, count: int) -> TopTokens:
    states = teacher.states(window)
    found = []
    for start in range(0, len(window), POSITIONS_AT_ONCE):
        part = slice(start, start + POSITIONS_AT_ONCE)
        found.append(TopTokens.of(teacher.logits(window[part], states[:, part]).logs(), count))
    whole = TopTokens(torch.cat([one.words for one in found]), torch.cat([one.logs for one in found]))
    if not math.isfinite(float(whole.logs.sum())):
        raise ValueError("the teacher has NaN or infinite logits: load it in float32 or bfloat16, or download it again")
    return whole
