"""The command `armorfact write`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from armorfact_hf.cli.options import MODEL_HELP, Device, Dtype
from armorfact_hf.cli.terminal import errors_as_sentences, say, shown_progress


def write(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)],
    out: Annotated[Path, typer.Option(help="The file to write.")],
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of text, at least.")] = 32768,
    seed: Annotated[int, typer.Option(min=0, help="Of the words that are drawn.")] = 0,
    dtype: Dtype = "auto",
    device: Device = None,
) -> None:
    """Let a dense model write text of its own, to calibrate it on.

    `armorfact prune --calibration self` does it by itself; a file is for models that are pruned from disk
    (`--stream`), for `armorfact recover`, and to look at.

    Examples:

    `armorfact write demo:smollm2 --out own.txt`

    `armorfact prune demo:smollm2 --out pruned --calibration demo:gensim-enwiki --calibration own.txt`
    """
    from armorfact_hf.runs.write import write_to_file

    with errors_as_sentences(), shown_progress() as observer:
        write_to_file(model, out, tokens, seed, dtype=dtype, device=device, observer=observer)
    say(f"Calibrate on it by `armorfact prune {model} --calibration {out} …`.")
