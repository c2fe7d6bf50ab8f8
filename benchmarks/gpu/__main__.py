"""Everything that a CUDA device can tell within minutes, most informative first.

    make gpu
    python -m benchmarks.gpu --seconds 1800 --out h100.json     the large sweeps, and a block pruned as by default
    python -m benchmarks.gpu --parts packed semi_structured     only these
    python -m benchmarks.gpu --table h100.json                  the figures as Markdown
    python -m benchmarks.gpu --device cpu --small               a dry run

Nothing is fetched or installed; what the machine lacks is skipped by name. Every figure is printed and kept in the file
as soon as it is there. Each part runs in a process of its own, which is killed at its limit, so that a kernel that
faults or hangs costs its own part only. The exit code is not 0 where a figure failed.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.gpu.isolation import isolated
from benchmarks.gpu.machine import machine
from benchmarks.gpu.parts import PARTS, SWEPT_BLOCK, measured
from benchmarks.gpu.report import FAILED, STOPPED, Figure, Report
from benchmarks.gpu.setup import Setup, small
from benchmarks.gpu.tables import extrapolation, swept_block, tables

SECONDS = 480


def main(given: list[str] | None = None) -> None:
    """Measure and print, or print the tables of an earlier run."""
    arguments = _arguments(given)
    if arguments.table is not None:
        try:
            print(tables(Report.read(arguments.table)))
        except (OSError, ValueError) as error:
            sys.exit(str(error))
        return
    setup = small(arguments.device) if arguments.small else Setup(arguments.device)
    report = Report(arguments.out, machine(setup.device), asdict(setup))
    print(", ".join(f"{name} {value or 'nothing'}" for name, value in report.machine.items()), flush=True)
    run(report, setup, arguments.parts, arguments.seconds)
    print(extrapolation(report) or "The time of a whole model cannot be told from these figures.")
    failed = sum(figure.status == FAILED for figure in report.figures)
    print(f"{len(report.figures)} figures, {failed} failed: {report.path}")
    if failed:
        raise SystemExit(1)


def run(report: Report, setup: Setup, parts: list[str], seconds: float) -> None:
    """Measure parts one after another, for so many seconds in all."""
    deadline = time.monotonic() + seconds
    for name in parts:
        left = deadline - time.monotonic()
        needed = swept_block(report) if name == SWEPT_BLOCK else None
        if left <= 0:
            figures = _stopped(name, f"the {seconds:.0f} s were over")
        elif needed is not None and needed.seconds > left:
            figures = _stopped(name, f"it would take {needed.seconds:.0f} s, and {left:.0f} s are left")
        else:
            figures = _within(name, setup, min(left, PARTS[name].share * seconds))
        for figure in figures:
            report.add(figure)
            print(figure, flush=True)


def _stopped(name: str, reason: str) -> Iterator[Figure]:
    yield Figure(name, {}, {}, STOPPED, reason)


def _within(name: str, setup: Setup, seconds: float) -> Iterator[Figure]:
    """The figures of a part; on a CPU in this process, where nothing can be lost, and a figure is always finished."""
    if setup.device != "cpu":
        yield from isolated(name, setup, seconds)
        return
    deadline = time.monotonic() + seconds
    for figure in measured(name, setup):
        yield figure
        if time.monotonic() > deadline:
            yield from _stopped(name, f"at its limit of {seconds:.0f} s")
            return


def _arguments(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"for all parts together; {SECONDS}")
    parser.add_argument("--out", type=Path, default=Path(time.strftime("gpu-%Y%m%d-%H%M%S.json")), help="a new file")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="small sizes: a dry run")
    parser.add_argument("--table", type=Path, metavar="FILE", help="print the figures of an earlier run as Markdown")
    arguments = parser.parse_args(given)
    if arguments.table is None and (reason := _refusal(arguments)):
        sys.exit(reason)
    return arguments


def _refusal(arguments: argparse.Namespace) -> str:
    """Why nothing can be measured as asked, and the way out; nothing if it can."""
    if arguments.device == "cpu" and not arguments.small:
        return "The sizes are a GPU's, and take hours on a CPU: add --small for a dry run."
    if arguments.device == "cuda" and not torch.cuda.is_available():
        return "PyTorch sees no CUDA device, so nothing was measured: --device cpu --small is a dry run on the CPU."
    if not arguments.seconds > 0:
        return f"--seconds must be above 0, got {arguments.seconds:g}."
    if arguments.out.exists():
        return f"{arguments.out} exists: name another file with --out, its figures are kept."
    if not arguments.out.absolute().parent.is_dir():
        return f"{arguments.out}: there is no folder {arguments.out.absolute().parent}; make it first."
    return ""


if __name__ == "__main__":
    main()
