"""The work in other processes, of this machine or of many, through Ray.

This process keeps the order of things, the journal and references to what others hold. Which process did what, and how
many there are, has no influence on bits: a window runs alone, a Gram matrix is summed by one task in the order of the
windows, a layer is pruned by one task, and a block is tuned by one worker, which is given the states of all windows.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import ray

from armorfact_hf.model.experts import put_layers_
from armorfact_hf.model.moments import merge_leaders_
from armorfact_hf.model.structure import Layer
from armorfact_hf.pruning.job import Job
from armorfact_hf.pruning.layer import round_layer, with_tuned_loss
from armorfact_hf.pruning.progress import Progress
from armorfact_hf.pruning.resume.entry import Pruned
from armorfact_hf.pruning.side_by_side import Keep, forget, layer_flops, threads_each
from armorfact_hf.pruning.tuning.matching import BlockReport
from armorfact_hf.pruning.workers import remote
from armorfact_hf.pruning.workers.cluster import RETRIES, Cluster, get, joined
from armorfact_hf.pruning.workers.gathered import Gathered
from armorfact_hf.pruning.workers.hands import Hands, hands_of
from armorfact_hf.pruning.workers.remote import Ref, alone
from armorfact_hf.pruning.workers.sent import sent
from armorfact_hf.pruning.workers.tuning import layers_by_name

Held = list[Ref]  # the state of each window


@dataclass
class OnRay:
    """The workers of a run in other processes; see `Workers`.

    Args:
        job: what is pruned; its layers are replaced in this process too.
        progress: is told of every layer and window.
        cluster: where the work is done. actors: the processes that hold the model. hands: who does all else.
        pruned, dense: the states of the model being pruned and of the dense one, or None. They move on.
        given: the states that the block at work is given. before_tail: those that the first of the last blocks is.
        replaced: the pruned layers of the block at work, and, in the end, of the last ones.
    """

    job: Job
    progress: Progress
    cluster: Cluster
    actors: Sequence[Any]
    hands: Hands
    pruned: Held | None
    dense: Held | None
    given: Held = field(default_factory=list)
    before_tail: Held = field(default_factory=list)
    replaced: list[Ref] = field(default_factory=list)

    @classmethod
    @contextmanager
    def of(cls, job: Job, progress: Progress, workers: int | None) -> Iterator[OnRay]:
        """The workers of a job, before its first block; see `joined`."""
        on_gpus = job.weights.device.type == "cuda"
        with joined(workers, on_gpus) as cluster:
            progress.observer.say(f"{cluster}.")
            # An actor holds its cores for as long as it lives, and would leave none to the tasks.
            options = {"num_cpus": 0, "num_gpus": cluster.share, "max_restarts": RETRIES, "max_task_retries": RETRIES}
            made = ray.put(sent(job))
            actors = [
                ray.remote(remote.Worker).options(**options).remote(made, cluster.threads)
                for _ in range(cluster.workers)
            ]
            start = [ray.put(remote.Held())] * len(job.tokens)
            pruned, dense = (list(start) if x else None for x in (job.follows_pruned, job.follows_dense))
            yield cls(job, progress, cluster, actors, hands_of(actors, on_gpus), pruned, dense)

    def statistics(self, index: int | None) -> Gathered:
        """The moments of the inputs of a block's layers; None is the head."""
        self._begin(index)
        names, leader = [layer.name for layer in self.job.layers_of(index)], dict[str, str]()
        called = [self._inputs(index, window, 2 + len(names)) for window in self._windows]
        for window, (leaders, dense, *_) in enumerate(called):
            self._tell_window(index, window, self._followed)
            merge_leaders_(leader, get(leaders))
            if self.dense is not None:
                self.dense[window] = dense
        parts = dict(zip(names, zip(*(parts for _, _, *parts in called), strict=True), strict=True))
        found = {name: self._gathered(name, parts[name]) for name in dict.fromkeys(leader.values())}
        gathered = Gathered(leader, found, self.hands)
        gathered.pool_(self.job.layers_of(index))
        return gathered

    def pass_by(self, index: int) -> None:
        """Move the dense model's states on through a block that needs no statistics."""
        self._begin(index)
        moved = [self._passed_by(index, window, held) for window, held in enumerate(self.dense or [])]
        for window in self._windows:
            self._tell_window(index, window, self._followed)
            if self.dense is not None:
                done, self.dense[window] = moved[window]
                get(done)

    def prune(
        self, layers: Sequence[Layer], statistics: Gathered, keep: Keep = forget, known: Collection[str] = ()
    ) -> Pruned:
        """What replaces each of the layers, each by a task of its own, largest first."""
        work = {layer.name: layer for layer in layers if layer.name in statistics.leader}
        threads = threads_each(list(work.values()), self.cluster.threads)
        waiting = [
            self.hands.do(remote.prune, threads, alone(layer), statistics.of(layer.name), self.job.config)
            for layer in sorted(work.values(), key=layer_flops, reverse=True)
            if layer.name not in known
        ]
        found = []
        while waiting:
            [done], waiting = ray.wait(waiting)
            layer, report = get(done)
            keep(layer, report)
            found.append((layer, report))
            self.progress.tell(1, report.name)
        return found

    def match(self, index: int, pruned: Pruned, statistics: Gathered) -> tuple[Pruned, BlockReport | None]:
        """The layers of a block, tuned together towards the states of the dense model behind it."""
        if self.job.matching is None or not pruned:
            return pruned, None
        self.progress.tell(self.job.tuning_steps[index], f"decoder block {index + 1}, tuned as a whole")
        return self._tuned(index, self.given, [(pruned, statistics)])

    def match_tail(self, blocks: Sequence[tuple[Pruned, Gathered]]) -> tuple[Pruned, BlockReport | None]:
        """The layers of the last blocks, tuned together towards the words of the dense model."""
        self.progress.tell(self.job.tail_steps, "the last decoder blocks, tuned as a whole")
        return self._tuned(None, self.before_tail, blocks)

    def round(self, pruned: Pruned, statistics: Gathered) -> Pruned:
        """The layers with their cores rounded to the dtype that the settings ask for, each by a task of its own."""
        config, dense = self.job.config, self.job.by_name
        if config.core_dtype is None:
            return pruned
        threads = threads_each([dense[report.name] for _, report in pruned], self.cluster.threads)
        given = [(alone(dense[report.name]), layer, report, statistics.of(report.name)) for layer, report in pruned]
        return get([self.hands.do(round_layer, threads, *those, config) for those in given])

    def distance(self, index: int | None, pruned: Pruned) -> float:
        """How far a block with these layers, or, with None, the last ones, is from what it was tuned towards."""
        given = self.before_tail if index is None else self.given
        return float(get(self.actors[0].distance.remote(index, pruned, given, self.dense, self.replaced)))

    def replace(self, pruned: Pruned) -> None:
        """Put pruned layers into the model, here and in every worker before it works on their block again."""
        put_layers_(self.job.model, layers_by_name(pruned))
        self.replaced.append(ray.put(pruned))

    def advance(self, index: int) -> None:
        """Move the pruned model's states on through a block as it is now."""
        if self.pruned is not None:
            for window, (done, held) in enumerate(self._advanced([index], self.pruned)):
                self._tell_window(index, window, 1)
                get(done)
                self.pruned[window] = held

    def follow_tail(self) -> None:
        """Bring the pruned model's states to where the blocks of the tail, as they are now, bring them."""
        if self.pruned is not None:
            moved = self._advanced(self.job.tail, self.before_tail)
            get([done for done, _ in moved])
            self.pruned = [held for _, held in moved]

    @property
    def _windows(self) -> range:
        return range(len(self.job.tokens))

    @property
    def _followed(self) -> int:
        return (self.pruned is not None) + (self.dense is not None)

    def _begin(self, index: int | None) -> None:
        self.replaced = []
        if index is None:
            return
        first = self.dense if self.pruned is None else self.pruned
        self.given = list(first or [])
        if index == self.job.tail.start and self.job.tail:
            self.before_tail = self.given

    def _inputs(self, index: int | None, window: int, returns: int) -> list[Ref]:
        pruned, dense = (None if held is None else held[window] for held in (self.pruned, self.dense))
        method = self._actor(window).inputs.options(num_returns=returns)
        return method.remote(index, window, pruned, dense, self.replaced)

    def _gathered(self, name: str, parts: Sequence[Ref]) -> Ref:
        return self.hands.do(remote.gather, self.cluster.threads, name, list(parts))

    def _advanced(self, blocks: Collection[int], held: Held) -> list[list[Ref]]:
        """For each window, a sign that it is done and its state, both references."""
        return [
            self._actor(window).advance.options(num_returns=2).remote(list(blocks), window, state, self.replaced)
            for window, state in enumerate(held)
        ]

    def _passed_by(self, index: int, window: int, held: Ref) -> list[Ref]:
        """As `_advanced` returns for a window."""
        return self._actor(window).pass_by.options(num_returns=2).remote(index, window, held, self.replaced)

    def _tuned(
        self, index: int | None, given: Held, blocks: Sequence[tuple[Pruned, Gathered]]
    ) -> tuple[Pruned, BlockReport]:
        pruned = [layer for layers, _ in blocks for layer in layers]
        layers, matched = get(self.actors[0].tune.remote(index, pruned, given, self.dense, self.replaced))
        if not matched.kept:
            return pruned, matched
        dense, threads = self.job.by_name, self.cluster.threads
        given_each = [
            (x, alone(dense[x.name]), layers[x.name], statistics.of(x.name))
            for given_layers, statistics in blocks
            for _, x in given_layers
        ]
        reports = [self.hands.do(with_tuned_loss, threads, *those, self.job.config) for those in given_each]
        return [(layers[x.name], x) for x in get(reports)], matched

    def _actor(self, window: int) -> Any:
        return self.actors[window % len(self.actors)]

    def _tell_window(self, index: int | None, window: int, times: int) -> None:
        for _ in range(0 if index is None else times):
            self.progress.tell(1, f"decoder block {(index or 0) + 1} of {len(self.job.blocks)}, window {window + 1}")
