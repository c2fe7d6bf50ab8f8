"""Options that several commands share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from armorfact_hf.evaluation.measure import Evaluation

MODEL_HELP = "A model folder, a name on the hub, or demo:smollm2, demo:gemma3-270m, demo:qwen2.5-coder-0.5b."
TEXT_HELP = "A file of plain text, demo:gensim-enwiki, demo:qasper or demo:python; may be given more than once."
CALIBRATION = "demo:gensim-enwiki"
TEXTS_HELP = f"A file of plain text, {CALIBRATION} or demo:python; may be given more than once: they share the windows."
CALIBRATION_HELP = (
    f"A file of plain text, {CALIBRATION}, demo:python, or self (what the dense model writes by itself); may be given "
    "more than once: they share the windows."
)

Dtype = Annotated[str, typer.Option(help="Of the weights: auto (as stored), float32, bfloat16, float16 or float64.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, …; a GPU if there is one.")]
Texts = Annotated[list[str], typer.Option("--text", help=TEXT_HELP)]
TaughtTexts = Annotated[list[str], typer.Option("--calibration", help=TEXTS_HELP)]
CalibrationTexts = Annotated[list[str], typer.Option("--calibration", help=CALIBRATION_HELP)]
CalibrationWindows = Annotated[
    int | None, typer.Option("--windows", min=2, help="Windows of calibration text; all of it if not given.")
]
Windows = Annotated[int, typer.Option(min=1, help="Windows of held-out text to measure on, at most.")]
Length = Annotated[int, typer.Option(min=2, help="Tokens of a window.")]


def evaluations_of(texts: list[str], windows: int | None, length: int, stride: int | None = None) -> list[Evaluation]:
    """What is measured on each text."""
    from armorfact_hf.evaluation.measure import Evaluation

    return [Evaluation(text, windows, length, stride) for text in texts]
