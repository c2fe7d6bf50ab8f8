"""From the name of a model to a file of text that it wrote."""

from __future__ import annotations

from pathlib import Path

from armorfact_hf.data.load_model import load_model
from armorfact_hf.data.own_text import BYTES_A_TOKEN, WRITING, check_writer, write_text
from armorfact_hf.files import check_room, written_beside
from armorfact_hf.observer import Observer


def write_to_file(
    model: Path | str,
    out: Path | str,
    tokens: int = 32768,
    seed: int = 0,
    *,
    dtype: str = "auto",
    device: str | None = None,
    observer: Observer | None = None,
) -> None:
    """Let a dense model write text of its own, to be calibrated on (`armorfact_hf.data.own_text`).

    Args:
        model, dtype, device: see `load_model`.
        out: the file. tokens: of text, at least. seed: of the words that are drawn.
        observer: told of every step; it prints sentences by default.

    Raises:
        FileExistsError: ``out`` exists. OSError: it cannot be written there. ValueError: no such model, one that cannot
            write text, or less than one token.
    """
    observer, out = observer or Observer(), Path(out)
    if out.exists():
        raise FileExistsError(f"{out} exists already: name a new file")
    if tokens < 1:
        raise ValueError(f"expected one token of text or more, got {tokens}")
    check_room(out.parent, BYTES_A_TOKEN * tokens)
    loaded = load_model(str(model), dtype, device, observer.say)
    check_writer(loaded)
    text = write_text(loaded.model, loaded.tokenizer, tokens, seed, observer.counts(WRITING))
    out.parent.mkdir(parents=True, exist_ok=True)
    with written_beside(out) as draft:
        draft.write_text(text, encoding="utf-8")
        if out.exists():
            raise FileExistsError(f"{out} was made by somebody else meanwhile: name a new file")
