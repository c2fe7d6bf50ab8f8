"""The command `armorfact`: each command calls one function of this package, and shows its progress and result."""

from __future__ import annotations

import typer

from armorfact_hf.cli import bench, evaluate, folders, prune, push, recover, teach, write

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    help="Cut the linear layers of a language model to 2:4 sparsity without losing the model.",
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)

app.command()(prune.prune)
app.command(name="eval")(evaluate.evaluate)
app.command()(recover.recover)
app.command()(teach.teach)
app.command()(write.write)
app.command()(push.push)
app.command()(folders.inspect)
app.command()(folders.export)
app.command()(bench.bench)
