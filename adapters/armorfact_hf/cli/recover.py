"""The command `armorfact recover`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from armorfact_hf.cli import tables
from armorfact_hf.cli.options import CALIBRATION, CalibrationWindows, Device, Length, TaughtTexts
from armorfact_hf.cli.terminal import errors_as_sentences, say, shown_progress
from armorfact_hf.recovery.settings import TRAINED, RecoverySettings

DEFAULTS = RecoverySettings()


def recover(
    folder: Annotated[Path, typer.Argument(help="A folder that `armorfact prune` wrote.")],
    out: Annotated[Path, typer.Option(help="The folder to write.")],
    train: Annotated[
        str, typer.Option(help=f"One of {', '.join(TRAINED)}: A, B and the kept values of C, or only A and B.")
    ] = DEFAULTS.train,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Steps of one window each; one pass over the windows if not given.")
    ] = None,
    rate: Annotated[
        float, typer.Option(help="The learning rate at its highest, as a share of the size of entries.")
    ] = DEFAULTS.rate,
    calibration: TaughtTexts = [CALIBRATION],  # noqa: B006
    windows: CalibrationWindows = None,
    length: Length = 2048,
    teacher: Annotated[
        str | None,
        typer.Option(
            help="A model with the same vocabulary, or what `armorfact teach` wrote of one; the one that was pruned if "
            "not given."
        ),
    ] = None,
    measure_every: Annotated[
        int, typer.Option(min=1, help="Steps between two measurements on the windows kept aside.")
    ] = DEFAULTS.measure_every,
    save_every: Annotated[int, typer.Option(min=1, help="Steps between two states that a kill leaves.")] = 10,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory, a third more time.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of the order of the windows.")] = DEFAULTS.seed,
    device: Device = None,
) -> None:
    """Tune a pruned model as a whole until it says what its dense model says; supports and sizes stay as they are.

    One window in eight, at most 8, is kept aside to measure on, and the best state there is what is written. A run that
    is killed continues when the same command is given again.

    Examples:

    `armorfact recover pruned --out recovered`

    `armorfact recover pruned --out recovered --train wrappers --steps 50`
    """
    from armorfact_hf.data.calibration import Calibration
    from armorfact_hf.runs.recover import recover_to_folder

    with errors_as_sentences(), shown_progress() as observer:
        settings = RecoverySettings(
            train=train,
            steps=steps,
            rate=rate,
            measure_every=measure_every,
            gradient_checkpointing=gradient_checkpointing,
            seed=seed,
        )
        report = recover_to_folder(
            folder,
            out,
            settings,
            Calibration(calibration, windows, length),
            teacher=teacher,
            device=device,
            save_every=save_every,
            observer=observer,
        )
    say(tables.recovered(report.recovery))
    say(f"Measure it by `armorfact eval {out}`.")
