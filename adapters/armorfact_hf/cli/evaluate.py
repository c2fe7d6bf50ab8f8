"""The command `armorfact eval`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from armorfact_hf.cli import tables
from armorfact_hf.cli.options import Device, Dtype, Length, Texts, Windows, evaluations_of
from armorfact_hf.cli.terminal import errors_as_sentences, show, shown_progress

if TYPE_CHECKING:
    from armorfact_hf.report.record import Report


def evaluate(
    model: Annotated[str, typer.Argument(help="A folder that `armorfact prune` wrote, or any model as there.")],
    text: Texts = ["demo:gensim-enwiki"],  # noqa: B006
    windows: Windows = 6,
    length: Length = 2048,
    stride: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens between the starts of two windows [default: LENGTH, less one for a bos]."),
    ] = None,
    tasks: Annotated[str, typer.Option(help="Of piqa,sciq,arc_easy,hellaswag,lambada,boolq (needs lm-eval).")] = "",
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many questions of each task.")] = None,
    dtype: Dtype = "auto",
    device: Device = None,
) -> None:
    """Measure perplexity, and accuracy on tasks; for a pruned model beside its dense one.

    Examples:

    `armorfact eval pruned --text demo:gensim-enwiki --text demo:qasper`

    `armorfact eval pruned --tasks piqa,sciq --limit 100`
    """
    from armorfact_hf.data.load_model import load_model
    from armorfact_hf.runs import evaluate as measuring

    with errors_as_sentences(), shown_progress() as observer:
        if limit is not None and not tasks:
            raise ValueError(f"--limit {limit} would not act: it is for --tasks")
        chosen = evaluations_of(text, windows, length, stride)
        names = [name.strip() for name in tasks.split(",") if name.strip()]
        found: Report | measuring.Figures
        if (Path(model) / "report.json").exists():
            if dtype != "auto":
                raise ValueError("a pruned folder is measured in the dtype it is stored in: leave out --dtype")
            found = measuring.evaluate_folder(Path(model), chosen, names, limit, device=device, observer=observer)
        else:
            loaded = load_model(model, dtype, device, observer.say)
            found = measuring.evaluate_dense(loaded, chosen, names, limit, observer=observer)
    show(tables.evaluations(found.evaluations))
    if found.tasks:
        show(tables.tasks(found.tasks))
