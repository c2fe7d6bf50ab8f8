"""The command `armorfact bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from armorfact_hf.cli import tables
from armorfact_hf.cli.options import Device, Dtype
from armorfact_hf.cli.terminal import errors_as_sentences, say, show, shown_progress
from armorfact_hf.observer import Step

PROMPT, NEW = 512, 64


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
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of the prompt, for --end-to-end.")] = PROMPT,
    new: Annotated[int, typer.Option(min=1, help="Tokens to write after it, for --end-to-end.")] = NEW,
    dtype: Dtype = "auto",
    device: Device = None,
) -> None:
    """Measure every distinct layer shape by every way to run it, and write the fastest choice beside the checkpoint.

    Loading the folder in the same dtype on a device of the same name (a CPU: with as many threads) follows that choice
    from then on.

    Examples:

    `armorfact bench pruned`

    `armorfact bench pruned --tokens 1,8,64,2048 --allow-dense --end-to-end`
    """
    from armorfact_hf.bench import layers as benches
    from armorfact_hf.bench import models as throughput
    from armorfact_hf.report.record import Report

    with errors_as_sentences():
        counts = _counts(tokens)
        if not end_to_end and (prompt, new) != (PROMPT, NEW):
            raise ValueError("--prompt and --new would not act: they are for --end-to-end")
        if end_to_end:
            Report.read(folder)  # raises before the work if it is not known
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
