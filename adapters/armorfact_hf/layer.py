"""Prune one linear layer: from its weight and the second moments of its inputs to a `FactorizedLinear`."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

import armorfact
from armorfact import BlockDiagonal, Core, DampingWarning, Pattern, Result, factorize
from armorfact_hf.config import PruneConfig
from armorfact_hf.linear import FactorizedLinear
from armorfact_hf.statistics import Moments
from armorfact_hf.structure import Layer

LARGEST_BLOCK = 128
MOST_OVERHEAD = 1 / 8  # what "auto" lets the wrappers add to a layer
CONVERGED = {"max_sweeps": 300, "rtol": 1e-4}  # the budget of the baseline "paper"


@dataclass(frozen=True)
class LayerReport:
    """What became of one layer.

    Args:
        name, decoder_block, shape, block: which layer, and the sizes of its wrappers' blocks (None without).
        losses: tr((W - W') H (W - W')') / tr(W H W') by method, H the plain Gram matrix (or its diagonal, where
            no method looks at more); for W' as it is stored, in its dtype.
        objective_loss, objective_initial_loss: the relative loss that the solver minimized, at its end and start.
        sweeps: accepted sweeps. seconds: spent on this layer's own method.
        dense_bytes, bytes: of the weight before and of what replaces it.
        tokens: that the statistics were gathered from.
        status: how the solver ended. notes: warnings on the way.
    """

    name: str
    decoder_block: int | None
    shape: tuple[int, int]
    block: tuple[int, int] | None
    losses: dict[str, float]
    objective_loss: float
    objective_initial_loss: float
    sweeps: int
    seconds: float
    dense_bytes: int
    bytes: int
    tokens: int
    status: str
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)


def fitting_block(shape: tuple[int, int], config: PruneConfig) -> tuple[tuple[int, int] | None, str]:
    """The blocks (block_out, block_in) that a layer gets; without any, None and the reason why."""
    d_out, d_in = shape
    group = Pattern.parse(config.pattern).group
    if d_in % group:
        return None, f"d_in = {d_in} is not a multiple of the pattern's group of {group}"
    if config.method != "armorfact":
        return (1, group), ""
    fitting = [b for b in range(group, LARGEST_BLOCK + 1, group) if d_out % b == 0 and d_in % b == 0]
    if config.block == "auto":
        light = [b for b in fitting if b / d_in + b / d_out <= MOST_OVERHEAD]
        if not fitting:
            return None, f"no block of up to {LARGEST_BLOCK} divides {d_out} and {d_in}"
        size = max(light, default=fitting[0])
    else:
        size = int(config.block)
        if d_out % size or d_in % size or size % group:
            return None, f"block {size} does not fit {d_out}x{d_in}; these do: {fitting or 'none'}"
    return (size, size), ""


def prune_layers(
    work: Sequence[tuple[Layer, Moments]],
    config: PruneConfig,
    finished: Callable[[Layer], object] = lambda layer: None,
) -> list[tuple[FactorizedLinear, LayerReport]]:
    """`prune_layer` for the layers of one decoder block, in order.

    On the CPU they are pruned side by side, each by a share of the cores: that takes no longer than one after the other
    by all cores, and, as threads then hardly wait for each other, five times less on a machine with other work to do.

    Args:
        finished: called with each layer once it is done, from the calling thread.
    """
    cores = torch.get_num_threads()
    workers = min(len(work), cores) if all(layer.weight.device.type == "cpu" for layer, _ in work) else 1
    if workers <= 1:
        return [_told(finished, layer, prune_layer(layer, moments, config)) for layer, moments in work]
    largest_first = sorted(range(len(work)), key=lambda k: -layer_flops(work[k][0]))
    with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(cores // workers,)) as pool:
        futures = {pool.submit(prune_layer, *work[k], config): k for k in largest_first}
        for future in as_completed(futures):
            finished(work[futures[future]][0])
    torch.set_num_threads(cores)  # what the workers set counts for threads to come
    return [future.result() for future in sorted(futures, key=futures.__getitem__)]


def _told(finished: Callable[[Layer], object], layer: Layer, result: Any) -> Any:
    finished(layer)
    return result


def layer_flops(layer: Layer) -> float:
    """What the work on a layer grows with: d_out d_in^2, its products with the Gram matrix."""
    d_out, d_in = layer.shape
    return float(d_out) * d_in * d_in


def prune_layer(layer: Layer, moments: Moments, config: PruneConfig) -> tuple[FactorizedLinear, LayerReport]:
    """What replaces a layer, and its report.

    Raises:
        ValueError: the weight holds NaN or infinite values; the message names the layer.
    """
    try:
        return _prune(layer, moments, config)
    except ValueError as error:
        raise ValueError(f"{layer.name}: {error}") from error


def _prune(layer: Layer, moments: Moments, config: PruneConfig) -> tuple[FactorizedLinear, LayerReport]:
    weight = layer.weight
    start = time.perf_counter()
    target = _target(weight.float(), moments, config)
    notes: list[str] = []
    with _noting(notes):
        fitted = _fit(target, moments.gram, config, weight.dtype)
    seconds = time.perf_counter() - start
    pruned = FactorizedLinear.of(*fitted.factors, _bias(layer))
    report = LayerReport(
        name=layer.name,
        decoder_block=layer.decoder_block,
        shape=layer.shape,
        block=pruned.block,
        losses=_losses(target, pruned, moments.gram, config),
        objective_loss=fitted.loss,
        objective_initial_loss=fitted.initial_loss,
        sweeps=fitted.sweeps,
        seconds=seconds,
        dense_bytes=weight.nbytes,
        bytes=pruned.nbytes - (0 if pruned.bias is None else pruned.bias.nbytes),
        tokens=moments.tokens,
        status=fitted.status,
        notes=tuple(notes),
    )
    return pruned, report


_notes: ContextVar[list[str] | None] = ContextVar("notes", default=None)


@contextmanager
def damping_noted() -> Iterator[None]:
    """Inside, a `DampingWarning` goes into the report of the layer that it arose at, and nowhere else.

    Warnings are the concern of a whole process, so this is entered once, around all threads that prune layers.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("always", DampingWarning)
        show = warnings.showwarning

        def note(message: Any, category: type[Warning], *where: Any, **more: Any) -> None:
            if not issubclass(category, DampingWarning):
                show(message, category, *where, **more)
            elif (notes := _notes.get()) is not None:
                notes.append(str(message))

        warnings.showwarning = note
        yield


@contextmanager
def _noting(notes: list[str]) -> Iterator[None]:
    """Collect this thread's `DampingWarning`s; outside of it, as for baselines, they are dropped."""
    token = _notes.set(notes)
    try:
        yield
    finally:
        _notes.reset(token)


def _bias(layer: Layer) -> Tensor | None:
    return None if layer.module.bias is None else layer.module.bias.detach()


def _target(weight: Tensor, moments: Moments, config: PruneConfig) -> Tensor:
    r"""The weight to come close to.

    With the cross moment :math:`X_d X^\top` of dense and pruned inputs, :math:`\|W X_d - \hat W X\|^2` shrunk by
    :math:`\lambda\|(W - \hat W)\operatorname{diag}(H)^{1/2}\|^2` is, up to a constant,
    :math:`\operatorname{tr}((V - \hat W)(H + \lambda\operatorname{diag}H)(V - \hat W)^\top)` with
    :math:`V = W + W (X_d X^\top - H)(H + \lambda\operatorname{diag}H)^{-1}`.
    """
    if config.target == "weight" or moments.cross is None:
        return weight
    # Rounding alone must not make the system singular where no shrinkage was asked for.
    gram = shrunk(moments.gram, max(config.diagonal_weight, 1e-6))
    alive = gram.diagonal() > 0
    gram.diagonal()[~alive] = 1.0
    moved = weight.double() @ (moments.cross - moments.gram)
    return (weight.double() + torch.linalg.solve(gram, moved, left=False)).to(weight.dtype)


def shrunk(gram: Tensor, diagonal_weight: float) -> Tensor:
    """H + λ diag(H), a new matrix."""
    result = gram.clone()
    result.diagonal().mul_(1 + diagonal_weight)
    return result


@dataclass(frozen=True)
class _Fit:
    factors: tuple[Core, BlockDiagonal | None, BlockDiagonal | None]
    loss: float
    initial_loss: float
    sweeps: int
    status: str


def _fit(weight: Tensor, gram: Tensor, config: PruneConfig, dtype: torch.dtype) -> _Fit:
    diagonal = gram.diagonal() if gram.ndim == 2 else gram
    if config.method != "armorfact":
        pruned = one_shot(config.method, weight, gram, config.pattern).to(dtype)
        core = Core.from_dense(pruned, Pattern.parse(config.pattern))
        loss = energy(weight.double() - pruned, gram) / (energy(weight, gram) or 1.0)
        return _Fit((core, None, None), loss, loss, 0, "pruned in one shot")
    given = shrunk(gram, config.diagonal_weight) if config.objective == "gram" else diagonal
    block, _ = fitting_block(tuple(weight.shape), config)
    result = factorize(
        weight.to(dtype),
        given.float(),
        block=block,
        pattern=config.pattern,
        init=config.init,
        normalize="nowag" if config.objective == "nowag" else None,
        max_sweeps=config.sweeps,
        rtol=config.rtol,
    )
    scale = result.weight_loss or 1.0
    last = result.history[-1].number if result.loss < result.initial_loss else 0
    factors = (result.core, result.left, result.right)
    return _Fit(factors, result.loss / scale, result.initial_loss / scale, last, result.status)


def one_shot(method: str, weight: Tensor, gram: Tensor, pattern: str) -> Tensor:
    """The weight pruned by one of the methods without wrappers, same dtype."""
    if method == "magnitude":
        return armorfact.magnitude(weight, pattern=pattern)
    return getattr(armorfact, method)(weight, gram.float(), pattern=pattern)


def energy(residual: Tensor, gram: Tensor) -> float:
    """tr(R H R') in float64, with H in full or as its diagonal."""
    residual, gram = residual.double(), gram.double()
    weighted = residual * gram if gram.ndim == 1 else residual @ gram
    return max(float((weighted * residual).sum()), 0.0)


def _losses(target: Tensor, pruned: FactorizedLinear, gram: Tensor, config: PruneConfig) -> dict[str, float]:
    weights = {config.method: _exact_weight(pruned)}
    for method in config.baselines:
        if method not in weights:
            weights[method] = _baseline(method, target, gram, config)
    whole = energy(target, gram) or 1.0
    return {method: energy(target.double() - weight, gram) / whole for method, weight in weights.items()}


def _exact_weight(pruned: FactorizedLinear) -> Tensor:
    """A C B in float64, so that nothing but the stored factors counts."""
    core = pruned.core.dense().double()
    if pruned.block is None:
        return core
    return armorfact.Factors(pruned.left.double(), core, pruned.right.double()).dense()


def _baseline(method: str, weight: Tensor, gram: Tensor, config: PruneConfig) -> Tensor:
    if method != "paper":
        return one_shot(method, weight, gram, config.pattern)
    return paper(weight, gram, replace(config, method="armorfact")).dense()


def paper(weight: Tensor, gram: Tensor, config: PruneConfig) -> Result:
    """The ARMOR paper's objective solved to convergence: diag(H), NoWag-normalized W, from the NoWag-P mask."""
    diagonal = gram.diagonal() if gram.ndim == 2 else gram
    block, _ = fitting_block(tuple(weight.shape), config)
    return factorize(
        weight, diagonal.float(), block=block, pattern=config.pattern, init="nowag", normalize="nowag", **CONVERGED
    )
