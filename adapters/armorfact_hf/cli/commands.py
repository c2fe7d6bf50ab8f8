"""The command `armorfact`: each command calls one function of this package, and shows its progress and result."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from armorfact_hf.cli import push, recover, tables
from armorfact_hf.cli.terminal import errors_as_sentences, say, show, show_plan, shown_progress
from armorfact_hf.observer import Step
from armorfact_hf.pruning import config as settings

if TYPE_CHECKING:
    from armorfact_hf.evaluation.measure import Evaluation
    from armorfact_hf.report.record import Report
    from armorfact_hf.runs.prune_to_folder import Calibration

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    help="Cut the linear layers of a language model to 2:4 sparsity without losing the model.",
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)

MODEL_HELP = "A model folder, a name on the hub, or demo:smollm2, demo:gemma3-270m, demo:qwen2.5-coder-0.5b."
TEXT_HELP = "A file of plain text, demo:gensim-enwiki or demo:qasper; may be given more than once."
DEFAULTS = settings.PruneConfig()

Dtype = Annotated[str, typer.Option(help="Of the weights: auto (as stored), float32, bfloat16 or float16.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, …; a GPU if there is one.")]
Texts = Annotated[list[str], typer.Option("--text", help=TEXT_HELP)]
Windows = Annotated[int, typer.Option(min=1, help="Windows of held-out text to measure on, at most.")]
Length = Annotated[int, typer.Option(min=2, help="Tokens of a window.")]


@app.command()
def prune(  # typer reads options from the signature: it is as long as there are settings
    model: Annotated[str, typer.Argument(help=MODEL_HELP)],
    out: Annotated[Path, typer.Option(help="The folder to write.")],
    method: Annotated[str, typer.Option(help=f"One of {', '.join(settings.METHODS)}.")] = DEFAULTS.method,
    pattern: Annotated[str, typer.Option(help="N:M, at most N non-zeros of M.")] = DEFAULTS.pattern,
    block: Annotated[str, typer.Option(help="Size of the wrappers' blocks, or auto.")] = str(DEFAULTS.block),
    tensor_parallel: Annotated[
        int, typer.Option(help="Ranks of a server that will share each layer: chooses blocks that no cut goes through.")
    ] = DEFAULTS.tensor_parallel,
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
    refine: Annotated[
        str, typer.Option(help="Tune each decoder block as a whole once it is factorized: block, or none.")
    ] = str(DEFAULTS.refine),
    passes: Annotated[
        int, typer.Option(help="Passes over the calibration windows while a block is tuned.")
    ] = DEFAULTS.passes,
    rate: Annotated[float, typer.Option(help="Learning rate of that.")] = DEFAULTS.rate,
    tail: Annotated[
        int, typer.Option(help="Blocks at the end that are tuned once more, together, towards the dense words.")
    ] = DEFAULTS.tail,
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
    with errors_as_sentences():
        chosen = settings.PruneConfig(
            method=method,
            pattern=pattern,
            block=int(block) if block.isdecimal() else block,
            tensor_parallel=tensor_parallel,
            objective=objective,
            shrinkage=shrinkage,
            propagate=propagate,
            target=target,
            init=init,
            sweeps=sweeps,
            rtol=rtol,
            refine=None if refine == "none" else refine,
            passes=passes,
            rate=rate,
            tail=tail,
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


def _calibration(text: str, samples: int, length: int) -> Calibration:
    from armorfact_hf.runs.prune_to_folder import Calibration

    return Calibration(text, samples, length)


def _evaluations(texts: list[str], windows: int | None, length: int, stride: int | None = None) -> list[Evaluation]:
    from armorfact_hf.evaluation.measure import Evaluation

    return [Evaluation(text, windows, length, stride) for text in texts]


def _prune(
    model: str,
    out: Path,
    config: settings.PruneConfig,
    calibration: Calibration,
    *,
    methods: list[str],
    evaluations: list[Evaluation],
    dtype: str,
    device: str | None,
    dry_run: bool,
) -> None:
    from armorfact_hf.data.load_model import load_model
    from armorfact_hf.pruning import plan
    from armorfact_hf.runs.compare import compare

    for method in methods:
        settings.PruneConfig(method=method)
    if dry_run:
        loaded = load_model(model, dtype, device, say)
        show_plan(plan.make_plan(loaded.model, calibration.tokens(loaded, say), config))
        return
    with shown_progress() as observer:
        rows = compare(
            model, out, config, methods, calibration, evaluations, dtype=dtype, device=device, observer=observer
        )
    show(tables.compared(rows))
    say(f"Report: {out / 'report.html'}")


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
    from armorfact_hf.data.load_model import load_model
    from armorfact_hf.runs import compare

    with errors_as_sentences(), shown_progress() as observer:
        chosen = _evaluations(text, windows, length, stride)
        names = [name.strip() for name in tasks.split(",") if name.strip()]
        found: Report | compare.Figures
        if (Path(model) / "report.json").exists():
            if dtype != "auto":
                raise ValueError("a pruned folder is measured in the dtype it is stored in: leave out --dtype")
            found = compare.evaluate_folder(Path(model), chosen, names, limit, device=device, observer=observer)
        else:
            loaded = load_model(model, dtype, device, observer.say)
            found = compare.evaluate_dense(loaded, chosen, names, limit, observer=observer)
    show(tables.evaluations(found.evaluations))
    if found.tasks:
        show(tables.tasks(found.tasks))


app.command()(recover.recover)
app.command()(push.push)


@app.command()
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


@app.command()
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


@app.command()
def bench(
    folder: Annotated[Path, typer.Argument(help="A folder that `armorfact prune` wrote.")],
    tokens: Annotated[
        str, typer.Option(help="Numbers of tokens in a layer's input, separated by commas.")
    ] = "1,4,16,64,512",
    allow_dense: Annotated[
        bool, typer.Option("--allow-dense", help="Where dense is fastest, keep a merged weight beside the factors.")
    ] = False,
    end_to_end: Annotated[
        bool, typer.Option("--end-to-end", help="Prompt and decode tokens a second and memory, dense and pruned.")
    ] = False,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of the prompt, for --end-to-end.")] = 512,
    new: Annotated[int, typer.Option(min=1, help="Tokens to write after it, for --end-to-end.")] = 64,
    dtype: Dtype = "auto",
    device: Device = None,
) -> None:
    """Measure every distinct layer shape by every way to run it, and write the fastest choice beside the checkpoint.

    Loading the folder on the same kind of device follows that choice from then on.

    Examples:

    `armorfact bench pruned`

    `armorfact bench pruned --tokens 1,8,64,2048 --allow-dense --end-to-end`
    """
    from armorfact_hf.bench import layers as benches
    from armorfact_hf.bench import models as throughput

    with errors_as_sentences():
        counts = _counts(tokens)
        with shown_progress() as observer:
            timings = benches.bench_folder(
                folder,
                counts,
                dtype=dtype,
                device=device,
                allow_dense=allow_dense,
                progress=lambda doing, done, total: observer.step(Step(done, total, doing)),
                log=observer.say,
            )
        show(tables.timings(timings))
        for sentence in tables.crossovers(timings, benches.choose(timings, allow_dense)):
            say(sentence)
        if end_to_end:
            show(tables.throughputs(throughput.end_to_end(folder, prompt, new, dtype, device)))


def _counts(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) for part in parts):
        raise ValueError(f"--tokens expects numbers of at least 1 separated by commas, such as 1,16,512; got {text!r}")
    return [int(part) for part in parts]
