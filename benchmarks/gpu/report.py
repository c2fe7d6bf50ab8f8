"""The figures of one run, in one JSON file that is complete after every figure."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

MEASURED, SKIPPED, FAILED, STOPPED = "measured", "skipped", "failed", "stopped"

Labels = Mapping[str, str | int]
Values = dict[str, float]


class Skipped(Exception):
    """Raised in place of a figure that cannot be had here; says why."""


@dataclass(frozen=True)
class Figure:
    """What was measured of one thing, or why it was not.

    Args:
        part: that it belongs to. of: what was measured, by label. values: by name, which ends in the unit.
        status: "measured", "skipped", "failed", or "stopped" at a limit. note: the reason of the last three.
    """

    part: str
    of: Labels
    values: Values = field(default_factory=dict)
    status: str = MEASURED
    note: str = ""

    def __str__(self) -> str:
        labels = " ".join(f"{name}={value}" for name, value in self.of.items())
        found = ", ".join(f"{name} {number(value)}" for name, value in self.values.items())
        return ": ".join(filter(None, [self.part, labels, found or f"{self.status}: {self.note}"]))


def number(value: float) -> str:
    """Four digits, with commas in thousands."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


@dataclass
class Report:
    """All figures so far.

    Args:
        path: of the file. machine: what was measured on. settings: the sizes. figures: in order. They grow.
    """

    path: Path
    machine: dict[str, Any]
    settings: dict[str, Any]
    figures: list[Figure] = field(default_factory=list)

    def add(self, figure: Figure) -> None:
        """Keep a figure, in place of an earlier one of the same thing, and write the file."""
        same = [k for k, old in enumerate(self.figures) if (old.part, old.of) == (figure.part, figure.of)]
        for k in same:
            self.figures[k] = figure
        if not same:
            self.figures.append(figure)
        self.write()

    def write(self) -> None:
        """Write the file beside its place, and rename it."""
        draft = self.path.with_name(f".{self.path.name}.part")
        content = {"machine": self.machine, "settings": self.settings, "figures": [asdict(x) for x in self.figures]}
        draft.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        os.replace(draft, self.path)

    @classmethod
    def read(cls, path: Path) -> Report:
        """The report in a file.

        Raises:
            ValueError: the file holds something else.
        """
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            figures = [Figure(**figure) for figure in found["figures"]]
            return cls(path, found["machine"], found["settings"], figures)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: expected figures that `make gpu` wrote, got {error!r}") from error

    def of_part(self, part: str) -> Iterator[Figure]:
        """The figures of one part."""
        return (figure for figure in self.figures if figure.part == part)

    def value(self, parts: tuple[str, ...], label: str | int, name: str) -> float | None:
        """A value by its name, of the figure in one of the parts that is labelled so; None if there is none."""
        for part in parts:
            for figure in self.of_part(part):
                if label in figure.of.values() and name in figure.values:
                    return figure.values[name]
        return None
