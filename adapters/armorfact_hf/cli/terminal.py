"""What the command line shows while it works: sentences, a bar, and errors that a person can mend."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from armorfact_hf.cli import tables
from armorfact_hf.observer import Observer, Step

if TYPE_CHECKING:
    from armorfact_hf.pruning.plan import Plan


def plain_console() -> Console:
    """Takes no name that comes from a file for markup, and breaks no tables in files."""
    return Console(width=None if sys.stdout.isatty() else 10_000, markup=False, emoji=False)


console = plain_console()
errors = Console(stderr=True)


@contextmanager
def errors_as_sentences() -> Iterator[None]:
    """Failures that the user can mend end the command with their sentence, not with a traceback."""
    from transformers.utils import logging

    logging.disable_progress_bar()  # there is one bar, and it is ours
    try:
        yield
    except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
        errors.print(f"[bold red]Error:[/] {type(error).__name__}: ", end="")
        errors.print(str(error), markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(1) from error


class OnConsole(Observer):
    """Prints sentences and plans, and moves a bar; in a file, a line every tenth of the way stands for the bar."""

    def __init__(self, bar: Progress) -> None:
        self.bar, self.task = bar, bar.add_task("", total=None)
        self.tenth = -1

    def say(self, sentence: str) -> None:
        say(sentence)

    def plan(self, plan: Plan) -> None:
        show_plan(plan)

    def step(self, step: Step) -> None:
        self.bar.update(self.task, description=step.doing, completed=step.done, total=step.total)
        tenth = 10 * step.done // max(step.total, 1)
        if self.bar.disable and tenth != self.tenth:
            self.tenth = tenth
            say(f"{10 * tenth:3d}%  {step.doing}")


@contextmanager
def shown_progress() -> Iterator[Observer]:
    """Who shows on the console how a job goes."""
    times = TimeElapsedColumn(), TimeRemainingColumn()
    columns = BarColumn(), TaskProgressColumn(), *times, TextColumn("{task.description}")
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        yield OnConsole(bar)


def show(table: Table) -> None:
    """Print a table."""
    console.print(table)


def say(sentence: str) -> None:
    """Print a sentence as it is."""
    console.print(sentence, markup=False, highlight=False, soft_wrap=True)


def show_plan(plan: Plan) -> None:
    """Print a plan in sentences."""
    for sentence in tables.plan_lines(plan):
        say(sentence)
