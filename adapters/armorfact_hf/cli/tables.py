"""What the command line prints: tables and sentences made of results."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Column, Table

if TYPE_CHECKING:
    from armorfact_hf.report.record import PerplexityRecord, TaskRecord

Rows = Sequence[Any]


def plan_lines(plan: Any) -> Iterator[str]:
    """What pruning will make of a model, what stays dense and why, and how long it will take."""
    ratio = plan.bytes / plan.dense_bytes
    yield (
        f"Plan: {len(plan.layers)} linear layers of a model with {plan.parameters:,} parameters; "
        f"{plan.dense_bytes / 1e6:,.1f} MB become {plan.bytes / 1e6:,.1f} MB ({ratio:.3f} of dense, "
        f"of which {plan.wrapper_overhead:.3f} for wrappers); about {plan.peak_bytes / 1e9:.1f} GB of memory"
    )
    yield from _room(plan)
    if plan.tensor_parallel > 1:
        yield from _for_ranks(plan)
    yield from _left_dense(plan.dense_layers)
    if plan.stays_dense >= 0.001:
        yield f"Of the weights in the decoder blocks {100 * plan.stays_dense:.1f}% stay dense"
    if plan.seconds is not None:
        alone = "" if plan.cluster is None else " in one process"
        yield f"Estimated time{alone}, from a measured first layer: {_about(plan.seconds)}"


def _room(plan: Any) -> Iterator[str]:
    """What memory and disk go to."""
    if plan.cluster is None:
        yield f"Memory, at most: {_parts(plan, plan.memory)}"
    else:
        yield f"Memory of this process, at most: {_parts(plan, plan.memory)}"
        worker = plan.cluster.worker
        yield f"Memory of each worker, at most {worker.peak / 1e9:.2f} GB: {_parts(plan, worker)}"
        yield f"Ray's object store, at most: {plan.cluster.store / 1e9:.2f} GB; what is too much for it goes to disk"
    if plan.experts_at_once is not None:
        yield f"Statistics of {plan.experts_at_once} experts at a time: calibration runs again for the others"
    waiting = f"; {plan.waiting_bytes / 1e9:.2f} GB wait there between blocks" if plan.waiting_bytes else ""
    yield f"Disk, at most: {plan.disk_bytes / 1e9:.2f} GB{waiting}"


def _parts(plan: Any, memory: Any) -> str:
    """What the memory of a process goes to."""
    weights = f"{memory.weights / 1e9:.2f} GB of weights"
    if plan.streamed:
        weights += f" at a time, of {plan.model_bytes / 1e9:.2f} GB that stay on disk"
    return (
        f"{weights}, {memory.pruned / 1e9:.2f} GB of what replaces them meanwhile, "
        f"{memory.statistics / 1e9:.2f} GB of statistics, {memory.states / 1e9:.2f} GB of windows' states, "
        f"{memory.work / 1e9:.2f} GB to work in"
    )


def _for_ranks(plan: Any) -> Iterator[str]:
    """What it costs that ranks of a server will share the layers."""
    ranks = plan.tensor_parallel
    yield (
        f"For {ranks} ranks: each holds at most {plan.rank_bytes / 1e6:,.1f} MB of these layers, "
        f"{ranks * plan.rank_bytes / plan.bytes:.3f} times its part: wrappers on one side of a cut are on every rank"
    )
    for (without, chosen), names in plan.recut.items():
        yield (
            f"For {ranks} ranks: blocks of {chosen[0]}x{chosen[1]} instead of {without[0]}x{without[1]}, which a cut "
            f"would go through: {_some(names)}"
        )


def _left_dense(layers: Rows) -> Iterator[str]:
    """A sentence a reason; the report names every layer."""
    by_reason: dict[str, list[str]] = {}
    for layer in layers:
        by_reason.setdefault(layer.reason, []).append(layer.name)
    for reason, names in by_reason.items():
        yield f"Left dense, {reason}: {_some(names)}"


def _some(names: Sequence[str]) -> str:
    """The first few."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _about(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def compared(rows: Rows) -> Table:
    """Methods beside the dense model: `armorfact_hf.runs.compare.compare`."""
    texts = list(rows[0].perplexity)
    headers = [header for text in texts for header in (f"perplexity, {text}", "x dense")]
    table = _table("method", *headers, "mean layer loss", "MB on disk", "seconds")
    for row in rows:
        cells = [_number(found.get(text)) for text in texts for found in (row.perplexity, row.ratio)]
        dense = row.name == "dense"
        table.add_row(
            row.name,
            *cells,
            "" if dense else f"{row.mean_loss:.4f}",
            f"{row.bytes / 1e6:,.1f}",
            "" if dense else f"{row.seconds:,.0f}",
        )
    return table


def evaluations(records: Sequence[PerplexityRecord]) -> Table:
    """Perplexity by text and method, with all that pins it."""
    table = _table("text", "split", "window", "stride", "bos", "tokens", "dense", "method", "perplexity", "x dense")
    for record in records:
        pinned = (record.text, record.split, record.window, record.stride, record.bos, record.tokens)
        for name, found in [(x.name, x.perplexity) for x in record.methods] or [("", record.dense)]:
            cells = f"{record.dense:.3f}", name, f"{found:.3f}", f"{found / record.dense:.3f}"
            table.add_row(*map(str, pinned), *cells)
    return table


def tasks(records: Sequence[TaskRecord]) -> Table:
    """Accuracy by task."""
    table = _table("task", "questions", "dense", "pruned", "standard error")
    for record in records:
        pruned = "" if record.pruned is None else f"{record.pruned:.3f}"
        error = "" if record.standard_error is None else f"{record.standard_error:.3f}"
        table.add_row(record.task, str(record.questions), f"{record.dense:.3f}", pruned, error)
    return table


def recovered(done: Any) -> str:
    """What a recovery gained."""
    by = "" if done.likeliest is None else f" (by its {done.likeliest} likeliest words)"
    whom = "dense" if done.teacher is None else done.teacher
    return (
        f"{done.before:.4f} nats a token from {whom} before, {done.after:.4f} after {done.best_step} of {done.steps} "
        f"steps, on {done.kept_aside} windows kept aside{by}."
    )


def held(layers: Rows) -> Table:
    """The layers of a pruned folder: `armorfact_hf.runs.inspect.inspect_folder`."""
    table = _table("layer", "shape", "block", "loss", "SparseGPT's", "bytes", "of dense")
    for layer in layers:
        shape = "x".join(map(str, layer.shape if layer.experts is None else (layer.experts, *layer.shape)))
        block = "none" if layer.block is None else "x".join(map(str, layer.block))
        block += f", {layer.wrapper_dtype}" if layer.wrapper_dtype else ""
        block += f", {layer.core_dtype} core" if layer.core_dtype else ""
        share = f"{layer.bytes / layer.dense_bytes:.3f}"
        table.add_row(
            layer.name, shape, block, _loss(layer.loss), _loss(layer.sparsegpt_loss), f"{layer.bytes:,}", share
        )
    return table


def held_sums(layers: Rows) -> Iterator[str]:
    """The bytes of all layers beside what theory says of them."""
    total, dense = sum(layer.bytes for layer in layers), sum(layer.dense_bytes for layer in layers)
    core, wrappers = (sum(layer.theory[part] for layer in layers) for part in (0, 1))
    yield f"{len(layers)} layers, {total:,} bytes, {total / dense:.4f} of dense; every tensor is whole"
    yield (
        f"Theory: {core / dense:.4f} for the cores, {wrappers / dense:.4f} for the wrappers, "
        f"{(core + wrappers) / dense:.4f} together"
    )


def timings(rows: Rows) -> Table:
    """Microseconds of a layer by strategy: `armorfact_hf.bench.layers.time_layers`."""
    strategies = list(dict.fromkeys(name for row in rows for name in row.seconds if name != "dense"))
    headers = [f"{name}, µs" for name in strategies]
    table = _table("layer", "tokens", "dense, µs", *headers, "fastest", "x dense", "wrappers")
    for row in rows:
        cells = [f"{row.seconds[name] * 1e6:,.0f}" if name in row.seconds else "" for name in strategies]
        fastest = row.fastest()
        table.add_row(
            row.shape,
            str(row.tokens),
            f"{row.dense * 1e6:,.0f}",
            *cells,
            fastest,
            f"{row.dense / row.seconds[row.fastest(allow_dense=False)]:.2f}",
            "" if row.wrappers is None else f"{100 * row.wrappers:.0f}%",
        )
    return table


def crossovers(rows: Rows, chosen: Mapping[str, Any]) -> Iterator[str]:
    """Up to how many tokens sparse wins, and what was chosen."""
    from armorfact_hf.bench.layers import crossover

    for shape, tokens in crossover(rows).items():
        wins = (
            "dense is faster from the first number on" if tokens is None else f"sparse is faster up to {tokens} tokens"
        )
        if shape not in chosen:
            yield f"{shape}: {wins}"
            continue
        ranges = ", ".join(
            f"{strategy} up to {limit}" if limit is not None else f"{strategy} above" if several else strategy
            for several in (len(chosen[shape].choices) > 1,)
            for limit, strategy in chosen[shape].choices
        )
        yield f"{shape}: {wins}; chosen: {ranges}"


def throughputs(rows: Rows) -> Table:
    """Whole models: `armorfact_hf.bench.models.end_to_end`."""
    dense = rows[0]
    table = _table("model", f"{dense.read} tokens read, per s", "decode, tokens/s", "weights, MB", "peak memory, MB")
    for row in rows:
        table.add_row(
            row.name,
            f"{row.prompt:,.0f} ({row.prompt / dense.prompt:.2f})",
            f"{row.decode:,.1f} ({row.decode / dense.decode:.2f})",
            f"{row.weights / 1e6:,.1f} ({row.weights / dense.weights:.3f})",
            f"{row.memory / 1e6:,.1f}" + (f" ({row.memory / dense.memory:.3f})" if dense.memory else ""),
        )
    return table


def _table(*headers: str) -> Table:
    """A table that breaks what is too wide for a terminal, and cuts nothing off."""
    return Table(*(Column(header, overflow="fold") for header in headers), box=None)


def _loss(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
