"""The command `armorfact teach`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from armorfact_hf.cli.options import CALIBRATION, CalibrationWindows, Device, Length, TaughtTexts
from armorfact_hf.cli.terminal import errors_as_sentences, say, shown_progress


def teach(
    model: Annotated[str, typer.Argument(help="The teacher: a folder, a name on the hub, or demo:smollm2.")],
    out: Annotated[Path, typer.Option(help="The folder to write, or to add to.")],
    likeliest: Annotated[int, typer.Option(min=1, help="How many words of each position are kept.")] = 128,
    calibration: TaughtTexts = [CALIBRATION],  # noqa: B006
    windows: CalibrationWindows = None,
    length: Length = 2048,
    device: Device = None,
) -> None:
    """Write down the likeliest words that a model says at every position of a text, to recover a pruned one from.

    `armorfact recover` then needs no teacher in memory: give it this folder, and the same text, windows and length. A
    position takes 6 bytes a word. A run that is killed continues when the same command is given again.

    Examples:

    `armorfact teach demo:smollm2 --out words`

    `armorfact recover pruned --out recovered --teacher words`
    """
    from armorfact_hf.data.calibration import Calibration
    from armorfact_hf.runs.teach import teach_to_folder

    with errors_as_sentences(), shown_progress() as observer:
        text = Calibration(calibration, windows, length)
        teach_to_folder(model, out, likeliest, text, device=device, observer=observer)
    say(f"Recover a pruned model from it by `armorfact recover FOLDER --out OUT --teacher {out}`.")
