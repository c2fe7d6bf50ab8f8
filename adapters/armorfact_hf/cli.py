"""The command `armorfact`: each command calls one function of this package, and shows its progress and result."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from armorfact_hf import config as settings

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    help="Cut the linear layers of a language model to 2:4 sparsity without losing the model.",
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)
console = Console()
errors = Console(stderr=True)

MODEL_HELP = "A model folder, a name on the hub, or demo:smollm2, demo:gemma3-270m, demo:qwen2.5-coder-0.5b."
TEXT_HELP = "A file of plain text, demo:gensim-enwiki or demo:qasper; may be given more than once."
DEFAULTS = settings.PruneConfig()

Dtype = Annotated[str, typer.Option(help="Of the weights: auto (as stored), float32, bfloat16 or float16.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, …; a GPU if there is one.")]
Texts = Annotated[list[str], typer.Option("--text", help=TEXT_HELP)]
Windows = Annotated[int, typer.Option(min=1, help="Windows of held-out text to measure on, at most.")]
Length = Annotated[int, typer.Option(min=2, help="Tokens of a window.")]


@app.command()
def prune(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)],
    out: Annotated[Path, typer.Option(help="The folder to write.")],
    method: Annotated[str, typer.Option(help=f"One of {', '.join(settings.METHODS)}.")] = DEFAULTS.method,
    pattern: Annotated[str, typer.Option(help="N:M, at most N non-zeros of M.")] = DEFAULTS.pattern,
    block: Annotated[str, typer.Option(help="Size of the wrappers' blocks, or auto.")] = str(DEFAULTS.block),
    objective: Annotated[str, typer.Option(help="gram, diagonal, or nowag (the ARMOR paper's).")] = DEFAULTS.objective,
    shrinkage: Annotated[
        float | None, typer.Option(help="λ of H + λ diag(H), for the objective gram [default: 1.0].")
    ] = DEFAULTS.shrinkage,
    propagate: Annotated[
        str, typer.Option(help="Inputs from the blocks before as they are: pruned, or dense.")
    ] = DEFAULTS.propagate,
    target: Annotated[
        str, typer.Option(help="Aim at weight (W X, X as pruned) or output (what the dense model computes).")
    ] = DEFAULTS.target,
    init: Annotated[str, typer.Option(help="Where the factorization starts.")] = DEFAULTS.init,
    sweeps: Annotated[int, typer.Option(help="Sweeps of the solver over a layer, at most.")] = DEFAULTS.sweeps,
    rtol: Annotated[float, typer.Option(help="A layer ends when sweeps gain less than this share.")] = DEFAULTS.rtol,
    include: Annotated[
        list[str], typer.Option(help="Layers to prune: last parts of their names, or re:EXPRESSION; repeatable.")
    ] = list(DEFAULTS.include),  # noqa: B006 (typer reads it, nothing changes it)
    ignore: Annotated[list[str], typer.Option(help="Layers to leave dense, written like --include.")] = [],  # noqa: B006
    head: Annotated[bool, typer.Option("--head", help="Prune the output head too.")] = False,
    baseline: Annotated[
        list[str], typer.Option(help=f"Losses to show beside in the report: {', '.join(settings.BASELINES)}; or none.")
    ] = list(DEFAULTS.baselines),  # noqa: B006
    calibration: Annotated[
        str, typer.Option(help="A file of plain text, or demo:gensim-enwiki.")
    ] = "demo:gensim-enwiki",
    samples: Annotated[int, typer.Option(min=1, help="Windows of calibration text.")] = 16,
    length: Length = 2048,
    compare: Annotated[
        str, typer.Option(help="Methods to prune by as well, into OUT-METHOD, and to show beside: wanda,sparsegpt.")
    ] = "",
    evaluate: Annotated[bool, typer.Option("--eval/--no-eval", help="Measure perplexity before and after.")] = True,
    text: Texts = ["demo:gensim-enwiki"],  # noqa: B006
    windows: Windows = 6,
    dtype: Dtype = "auto",
    device: Device = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan, with a time estimate, and stop.")] = False,
) -> None:
    """Prune a model, save it with a report, and show what it cost in perplexity.

    A run that is killed continues when the same command is given again.

    Examples:

    `armorfact prune demo:smollm2 --out pruned`

    `armorfact prune ./llama --out pruned --include 're:.*mlp.*' --dtype bfloat16 --calibration text.txt`

    `armorfact prune demo:smollm2 --out pruned --compare wanda,sparsegpt`
    """
    with _errors_as_sentences():
        chosen = settings.PruneConfig(
            method=method,
            pattern=pattern,
            block=int(block) if block.isdecimal() else block,
            objective=objective,
            shrinkage=shrinkage,
            propagate=propagate,
            target=target,
            init=init,
            sweeps=sweeps,
            rtol=rtol,
            include=tuple(include),
            ignore=tuple(ignore),
            head=head,
            baselines=() if baseline == ["none"] else tuple(baseline),
        )
        _prune(
            model,
            out,
            chosen,
            _calibration(calibration, samples, length),
            methods=[name.strip() for name in compare.split(",") if name.strip()],
            evaluations=_evaluations(text, windows, length) if evaluate else [],
            dtype=dtype,
            device=device,
            dry_run=dry_run,
        )


def _calibration(text: str, samples: int, length: int) -> Any:
    from armorfact_hf.workflow import Calibration

    return Calibration(text, samples, length)


def _evaluations(texts: list[str], windows: int | None, length: int, stride: int | None = None) -> list[Any]:
    from armorfact_hf.assess import Evaluation

    return [Evaluation(text, windows, length, stride) for text in texts]


def _prune(
    model: str,
    out: Path,
    config: settings.PruneConfig,
    calibration: Any,
    *,
    methods: list[str],
    evaluations: list[Any],
    dtype: str,
    device: str | None,
    dry_run: bool,
) -> None:
    from armorfact_hf import assess, plan, sources

    for method in methods:
        settings.PruneConfig(method=method)
    if dry_run:
        loaded = sources.load_model(model, dtype, device, _say)
        _show_plan(plan.make_plan(loaded.model, calibration.tokens(loaded, _say), config))
        return
    with _bar() as told:
        rows = assess.compare(
            model,
            out,
            config,
            methods,
            calibration,
            evaluations,
            dtype=dtype,
            device=device,
            log=_say,
            progress=lambda done, total: told("measuring perplexity", done, total),
            pruning=lambda step: told(step.doing, step.done, step.total),
            on_plan=_show_plan,
        )
    _show_rows(rows)
    console.print(f"Report: {out / 'report.html'}")


@app.command(name="eval")
def evaluate_command(
    model: Annotated[str, typer.Argument(help="A folder that `armorfact prune` wrote, or any model as there.")],
    text: Texts = ["demo:gensim-enwiki"],  # noqa: B006
    windows: Windows = 6,
    length: Length = 2048,
    stride: Annotated[
        int | None, typer.Option(min=1, help="Tokens between the starts of two windows; LENGTH if not given.")
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
    from armorfact_hf import assess, sources

    with _errors_as_sentences(), _bar() as told:
        chosen = _evaluations(text, windows, length, stride)
        names = [name.strip() for name in tasks.split(",") if name.strip()]

        def progress(done: int, total: int) -> None:
            told("measuring perplexity", done, total)

        if (Path(model) / "report.json").exists():
            if dtype != "auto":
                raise ValueError("a pruned folder is measured in the dtype it is stored in: leave out --dtype")
            report = assess.evaluate_folder(
                Path(model), chosen, names, limit, device=device, progress=progress, log=_say
            )
        else:
            loaded = sources.load_model(model, dtype, device, _say)
            report = assess.evaluate_dense(loaded, chosen, names, limit, progress=progress, log=_say)
    _show_evaluations(report["evaluations"])
    _show_tasks(report["tasks"])


@app.command()
def inspect(folder: Annotated[Path, typer.Argument(help="A folder that `armorfact prune` wrote.")]) -> None:
    """List what a pruned folder holds: shapes, blocks, losses and bytes of every pruned layer.

    Example:

    `armorfact inspect pruned`
    """
    from armorfact_hf.look import inspect_folder

    with _errors_as_sentences():
        layers = inspect_folder(folder)
        table = Table("layer", "shape", "block", "loss", "SparseGPT's", "bytes", "of dense", box=None)
        for layer in layers:
            shape = "x".join(map(str, layer.shape))
            block = "none" if layer.block is None else "x".join(map(str, layer.block))
            share = f"{layer.bytes / layer.dense_bytes:.3f}"
            table.add_row(
                layer.name, shape, block, _loss(layer.loss), _loss(layer.sparsegpt_loss), f"{layer.bytes:,}", share
            )
        console.print(table)
        held, dense = sum(layer.bytes for layer in layers), sum(layer.dense_bytes for layer in layers)
        console.print(f"{len(layers)} layers, {held:,} bytes, {held / dense:.3f} of dense")


@app.command()
def export(
    folder: Annotated[Path, typer.Argument(help="A folder that `armorfact prune` wrote.")],
    out: Annotated[Path, typer.Option(help="The new folder.")],
) -> None:
    """Write the pruned model with ordinary dense weights, for any tool that loads Hugging Face folders.

    Example:

    `armorfact export pruned --out dense`
    """
    from armorfact_hf.look import export_dense

    with _errors_as_sentences():
        export_dense(folder, out, _say)
        console.print(f"Wrote {out}")


@contextmanager
def _errors_as_sentences() -> Iterator[None]:
    """Failures that the user can mend end the command with their sentence, not with a traceback."""
    from transformers.utils import logging

    logging.disable_progress_bar()  # there is one bar, and it is ours
    try:
        yield
    except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
        errors.print(f"[bold red]Error:[/] {type(error).__name__}: ", end="")
        errors.print(str(error), markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(1) from error
    except KeyboardInterrupt:
        errors.print("Interrupted; the same command continues from the last finished decoder block.")
        raise typer.Exit(130) from None


@contextmanager
def _bar() -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar, or a line every tenth of the way into a file; the function given says how far it is."""
    times = TimeElapsedColumn(), TimeRemainingColumn()
    columns = BarColumn(), TaskProgressColumn(), *times, TextColumn("{task.description}")
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None)
        tenths = {"said": -1}

        def told(doing: str, done: int, total: int) -> None:
            bar.update(task, description=doing, completed=done, total=total)
            tenth = 10 * done // max(total, 1)
            if bar.disable and tenth != tenths["said"]:
                tenths["said"] = tenth
                _say(f"{10 * tenth:3d}%  {doing}")

        yield told


def _say(sentence: str) -> None:
    console.print(sentence, markup=False, highlight=False, soft_wrap=True)


def _loss(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _show_plan(plan: Any) -> None:
    ratio = plan.bytes / plan.dense_bytes
    console.print(
        f"Plan: {len(plan.layers)} linear layers of a model with {plan.parameters:,} parameters; "
        f"{plan.dense_bytes / 1e6:,.1f} MB become {plan.bytes / 1e6:,.1f} MB ({ratio:.3f} of dense, "
        f"{100 * plan.wrapper_overhead:.1f}% of it for wrappers); about {plan.peak_bytes / 1e9:.1f} GB of memory",
        highlight=False,
    )
    for sentence in _left_dense(plan.dense_layers):
        _say(sentence)
    if plan.seconds is not None:
        console.print(f"Estimated time, from a measured first layer: {_duration(plan.seconds)}", highlight=False)


def _left_dense(layers: Sequence[Any]) -> Iterator[str]:
    """A sentence a reason; the report names every layer."""
    by_reason: dict[str, list[str]] = {}
    for layer in layers:
        by_reason.setdefault(layer.reason, []).append(layer.name)
    for reason, names in by_reason.items():
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        yield f"Left dense, {reason}: {', '.join(names[:3])}{more}"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _show_rows(rows: list[Any]) -> None:
    texts = list(rows[0].perplexity)
    headers = [header for text in texts for header in (f"perplexity, {text}", "x dense")]
    table = Table("method", *headers, "mean layer loss", "MB on disk", "seconds", box=None)
    for row in rows:
        cells = [_number(found.get(text)) for text in texts for found in (row.perplexity, row.ratio)]
        dense = row.name == "dense"
        table.add_row(
            row.name,
            *cells,
            "" if dense else f"{row.mean_loss:.4f}",
            f"{row.bytes / 1e6:,.1f}",
            "" if dense else f"{row.seconds:,.0f}",
        )
    console.print(table)


def _show_evaluations(evaluations: list[dict[str, Any]]) -> None:
    table = Table(
        "text", "split", "window", "stride", "bos", "tokens", "dense", "method", "perplexity", "x dense", box=None
    )
    for entry in evaluations:
        pinned = [str(entry[key]) for key in ("text", "split", "window", "stride", "bos", "tokens")]
        for row in entry["methods"] or [{"name": "", "perplexity": entry["dense"]}]:
            found = row["perplexity"]
            table.add_row(
                *pinned, f"{entry['dense']:.3f}", row["name"], f"{found:.3f}", f"{found / entry['dense']:.3f}"
            )
    console.print(table)


def _show_tasks(tasks: list[dict[str, Any]]) -> None:
    if not tasks:
        return
    table = Table("task", "questions", "dense", "pruned", "standard error", box=None)
    for row in tasks:
        pruned = "" if row["pruned"] is None else f"{row['pruned']:.3f}"
        error = f"{row['standard_error']:.3f}"
        table.add_row(row["task"], str(row["questions"]), f"{row['dense']:.3f}", pruned, error)
    console.print(table)
