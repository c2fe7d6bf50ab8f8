"""The command `armorfact prune`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from armorfact_hf.cli import tables
from armorfact_hf.cli.options import (
    CALIBRATION,
    MODEL_HELP,
    CalibrationTexts,
    Device,
    Dtype,
    Texts,
    Windows,
    evaluations_of,
)
from armorfact_hf.cli.terminal import errors_as_sentences, say, show, shown_progress
from armorfact_hf.pruning import config as settings

if TYPE_CHECKING:
    from armorfact_hf.data.calibration import Calibration
    from armorfact_hf.evaluation.measure import Evaluation

DEFAULTS = settings.PruneConfig()
TEXTS, WINDOWS = ["demo:gensim-enwiki"], 6  # to measure on


def prune(  # typer reads options from the signature: it is as long as there are settings
    model: Annotated[str, typer.Argument(help=MODEL_HELP)],
    out: Annotated[Path, typer.Option(help="The folder to write.")],
    method: Annotated[str, typer.Option(help=f"One of {', '.join(settings.METHODS)}.")] = DEFAULTS.method,
    pattern: Annotated[str, typer.Option(help="N:M, at most N non-zeros of M.")] = DEFAULTS.pattern,
    block: Annotated[
        str, typer.Option(help="Size of the wrappers' blocks, auto, or priced (by what each layer costs).")
    ] = str(DEFAULTS.block),
    tensor_parallel: Annotated[
        int, typer.Option(help="Ranks of a server that will share each layer: chooses blocks that no cut goes through.")
    ] = DEFAULTS.tensor_parallel,
    objective: Annotated[
        str, typer.Option(help="gram, normalized, diagonal, or nowag (the ARMOR paper's).")
    ] = DEFAULTS.objective,
    shrinkage: Annotated[
        float | None, typer.Option(help="λ of H + λ diag(H), for the objectives gram and normalized [default: 1.0].")
    ] = DEFAULTS.shrinkage,
    propagate: Annotated[
        str, typer.Option(help="Inputs from the blocks before as they are: pruned, or dense.")
    ] = DEFAULTS.propagate,
    target: Annotated[
        str, typer.Option(help="Aim at weight (W X, X as pruned) or output (what the dense model computes).")
    ] = DEFAULTS.target,
    init: Annotated[
        str, typer.Option(help=f"Where the factorization starts: {', '.join(settings.ONE_SHOT)}.")
    ] = DEFAULTS.init,
    sweeps: Annotated[int, typer.Option(help="Sweeps of the solver over a layer, at most.")] = DEFAULTS.sweeps,
    rtol: Annotated[float, typer.Option(help="A layer ends when sweeps gain less than this share.")] = DEFAULTS.rtol,
    refine: Annotated[
        str, typer.Option(help="Tune each decoder block as a whole once it is factorized: block, or none.")
    ] = str(DEFAULTS.refine),
    passes: Annotated[
        int, typer.Option(help="Passes over the calibration windows while a block is tuned.")
    ] = DEFAULTS.passes,
    rate: Annotated[
        float, typer.Option(help="Learning rate of that, as a share of the size of entries.")
    ] = DEFAULTS.rate,
    tail: Annotated[
        int, typer.Option(help="Blocks at the end that are tuned once more, together, towards the dense words.")
    ] = DEFAULTS.tail,
    core_dtype: Annotated[
        str | None,
        typer.Option(help="int8 rounds the kept values after all tuning; scales go into the wrappers [default: none]."),
    ] = DEFAULTS.core_dtype,
    wrapper_dtype: Annotated[
        str | None,
        typer.Option(help="int8 rounds the wrappers as well, with --core-dtype int8 [default: none]."),
    ] = DEFAULTS.wrapper_dtype,
    include: Annotated[
        list[str], typer.Option(help="Layers to prune: last parts of their names, or re:EXPRESSION; repeatable.")
    ] = list(DEFAULTS.include),  # noqa: B006 (typer reads it, nothing changes it)
    ignore: Annotated[list[str], typer.Option(help="Layers to leave dense, written like --include.")] = [],  # noqa: B006
    head: Annotated[bool, typer.Option("--head", help="Prune the output head too.")] = False,
    baseline: Annotated[
        list[str], typer.Option(help=f"Losses to show beside in the report: {', '.join(settings.BASELINES)}; or none.")
    ] = list(DEFAULTS.baselines),  # noqa: B006
    calibration: CalibrationTexts = [CALIBRATION],  # noqa: B006
    samples: Annotated[int, typer.Option(min=1, help="Windows of calibration text.")] = 16,
    length: Annotated[
        int, typer.Option(min=2, help="Tokens of a window, of calibration and of perplexity alike.")
    ] = 2048,
    compare: Annotated[
        str, typer.Option(help="Methods to prune by as well, into OUT-METHOD, and to show beside: wanda,sparsegpt.")
    ] = "",
    evaluate: Annotated[bool, typer.Option("--eval/--no-eval", help="Measure perplexity before and after.")] = True,
    text: Texts = TEXTS,
    windows: Windows = WINDOWS,
    dtype: Dtype = "auto",
    device: Device = None,
    stream: Annotated[
        bool | None,
        typer.Option(
            "--stream/--no-stream",
            help="Read decoder blocks from disk one at a time [default: where memory does not hold the model].",
        ),
    ] = None,
    states: Annotated[
        str,
        typer.Option(help="Where calibration windows wait between decoder blocks: memory, disk, or auto (by size)."),
    ] = "auto",
    workers: Annotated[
        str | None, typer.Option(help="Other processes to work in: so many of this machine, or ray (at RAY_ADDRESS).")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan, with a time estimate, and stop.")] = False,
) -> None:
    """Prune a model, save it with a report, and show what it cost in perplexity.

    A run that is killed continues when the same command is given again.

    Examples:

    `armorfact prune demo:smollm2 --out pruned`

    `armorfact prune ./llama --out pruned --include 're:.*mlp.*' --dtype bfloat16 --calibration text.txt`

    `armorfact prune ./code-model --out pruned --calibration text.txt --calibration demo:python --text held-out.txt`

    `armorfact prune demo:smollm2 --out pruned --compare wanda,sparsegpt`

    `armorfact prune ./larger-than-memory --out pruned --stream --dry-run`
    """
    with errors_as_sentences():
        if not evaluate and (list(text), windows) != (TEXTS, WINDOWS):
            raise ValueError("--text and --windows would not act: --no-eval measures nothing")
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
            core_dtype=core_dtype,
            wrapper_dtype=wrapper_dtype,
            include=tuple(include),
            ignore=tuple(ignore),
            head=head,
            baselines=() if baseline == ["none"] else tuple(baseline),
        )
        from armorfact_hf.data.calibration import Calibration

        how = {"dtype": dtype, "device": device, "stream": stream, "states": states, "workers": workers}
        methods = [name.strip() for name in compare.split(",") if name.strip()]
        evaluations = evaluations_of(text, windows, length) if evaluate else []
        texts = Calibration(calibration, samples, length)
        for name in methods:
            settings.PruneConfig(method=name)
        if dry_run:
            _plan(model, chosen, texts, methods, evaluations, **how)
        else:
            _prune(model, out, chosen, texts, methods, evaluations, **how)


def _plan(
    model: str,
    config: settings.PruneConfig,
    calibration: Calibration,
    methods: list[str],
    evaluations: list[Evaluation],
    **how: Any,
) -> None:
    from armorfact_hf.data.texts import check_name
    from armorfact_hf.pruning.plan import plan_job
    from armorfact_hf.pruning.workers.choice import check_workers
    from armorfact_hf.runs.load_to_prune import job_of, load_to_prune

    check_workers(how["workers"])
    with shown_progress() as observer:
        for evaluation in evaluations:
            check_name(evaluation.text)
        if methods:
            observer.say(f"The plan is of {config.method} alone, without {', '.join(methods)}.")
        loaded = load_to_prune(model, config, calibration, observer=observer, **how)
        job = job_of(loaded, config, calibration, observer, states=how["states"])
        check_workers(how["workers"], job)
        observer.plan(plan_job(job, workers=how["workers"]))


def _prune(
    model: str,
    out: Path,
    config: settings.PruneConfig,
    calibration: Calibration,
    methods: list[str],
    evaluations: list[Evaluation],
    **how: Any,
) -> None:
    from armorfact_hf.runs.compare import compare

    with shown_progress() as observer:
        rows = compare(model, out, config, methods, calibration, evaluations, observer=observer, **how)
    show(tables.compared(rows))
    say(f"Report: {out / 'report.html'}")
