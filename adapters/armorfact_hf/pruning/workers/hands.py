"""Who calls a function that any process of a cluster may call, and calls it again where that process is killed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any, Protocol

import ray
import torch

from armorfact_hf.pruning.workers.cluster import RETRIES
from armorfact_hf.pruning.workers.remote import Ref


class Hands(Protocol):
    """Somebody who calls functions."""

    def do(self, function: Callable[..., Any], threads: int, *arguments: Any) -> Ref:
        """Refers to what a function returns, which computes by so many threads on a CPU."""


@dataclass(frozen=True)
class Tasks:
    """Whatever process has the cores."""

    def do(self, function: Callable[..., Any], threads: int, *arguments: Any) -> Ref:
        """See `Hands`."""
        task = ray.remote(by_threads).options(num_cpus=threads, max_retries=RETRIES)
        return task.remote(threads, function, *arguments)


@dataclass
class Turns:
    """The workers, one after the other: each has a device, of which a task would know nothing.

    Args:
        actors: the workers.
    """

    actors: Sequence[Any]

    def __post_init__(self) -> None:
        self._turns = cycle(self.actors)

    def do(self, function: Callable[..., Any], threads: int, *arguments: Any) -> Ref:
        """See `Hands`."""
        return next(self._turns).act.remote(function, *arguments)


def by_threads(threads: int, function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function returns that computes by so many threads."""
    torch.set_num_threads(threads)
    return function(*arguments)


def hands_of(actors: Sequence[Any], on_gpus: bool) -> Hands:
    """Who calls functions beside these workers."""
    return Turns(actors) if on_gpus else Tasks()
