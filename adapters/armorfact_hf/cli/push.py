"""`armorfact push`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from armorfact_hf.cli.terminal import errors_as_sentences, say


def push(
    folder: Annotated[Path, typer.Argument(help="A folder that `armorfact prune` or `armorfact recover` wrote.")],
    repo: Annotated[str, typer.Argument(help="The repository on the hub, OWNER/NAME; it is made if it is not there.")],
    private: Annotated[bool, typer.Option("--private", help="Make the repository a private one.")] = False,
    message: Annotated[str, typer.Option(help="Of the commit.")] = "Upload a model pruned by armorfact",
) -> None:
    """Verify a pruned folder, tensor by tensor, and upload it to the hub with its model card.

    The token is the one that `hf auth login` or HF_TOKEN left.

    Example:

    `armorfact push pruned me/smollm2-2to4 --private`
    """
    from armorfact_hf.runs.push import push_to_hub

    with errors_as_sentences():
        say(f"It is at {push_to_hub(folder, repo, private=private, message=message, log=say)}")
