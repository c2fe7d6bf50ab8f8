"""The commands `armorfact inspect` and `armorfact export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from armorfact_hf.cli import tables
from armorfact_hf.cli.terminal import errors_as_sentences, say, show


def inspect(folder: Annotated[Path, typer.Argument(help="A folder that `armorfact prune` wrote.")]) -> None:
    """Verify a pruned folder, tensor by tensor, and list what it holds: shapes, blocks, losses, bytes of every layer.

    Example:

    `armorfact inspect pruned`
    """
    from armorfact_hf.runs.inspect import inspect_folder

    with errors_as_sentences():
        layers = inspect_folder(folder)
        show(tables.held(layers))
        for sentence in tables.held_sums(layers):
            say(sentence)


def export(
    folder: Annotated[Path, typer.Argument(help="A folder that `armorfact prune` wrote.")],
    out: Annotated[Path, typer.Option(help="The new folder.")],
) -> None:
    """Write the pruned model with ordinary dense weights, for any tool that loads Hugging Face folders.

    Example:

    `armorfact export pruned --out dense`
    """
    from armorfact_hf.runs.export import export_dense

    with errors_as_sentences():
        export_dense(folder, out, say)
        say(f"Wrote {out}")
