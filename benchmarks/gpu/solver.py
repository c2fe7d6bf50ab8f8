"""The core's sweep and SparseGPT on the device, beside the matrix products that they are made of."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

from armorfact import Pattern, Problem, blocks, magnitude, sparsegpt
from armorfact.gram import FullGram
from armorfact.solvers.exact import sweep
from benchmarks.gpu.parts import Item
from benchmarks.gpu.report import Skipped, Values
from benchmarks.gpu.setup import Setup, Shape, shape_name
from benchmarks.gpu.timer import Timer, timer_of
from benchmarks.sweep import products_seconds

WARM = (256, 256)
PRODUCTS = 5  # measurements of them


def sweeps(which: str, setup: Setup) -> Iterator[Item]:
    """One sweep in float32 with a full Gram matrix, measured once after one over a small weight."""
    for shape in getattr(setup, which):
        yield {"layer": shape_name(shape)}, partial(_sweep, setup, shape)


def cupy_sweep(setup: Setup) -> Iterator[Item]:
    """The smallest of them on CuPy's arrays."""
    shape = setup.sweeps[0]
    yield {"layer": shape_name(shape)}, partial(_cupy_sweep, setup, shape)


def greedy(setup: Setup) -> Iterator[Item]:
    """SparseGPT in float32, measured once after a small weight."""
    for size in setup.greedy:
        yield {"layer": shape_name((size, size))}, partial(_greedy, setup, size)


def _cupy_sweep(setup: Setup, shape: Shape) -> Values:
    import cupy

    if setup.device == "cpu":
        raise Skipped("CuPy's arrays are on CUDA devices")
    return _sweep(setup, shape, cupy.from_dlpack)


def _sweep(setup: Setup, shape: Shape, convert: Callable[[Tensor], Any] = lambda tensor: tensor) -> Values:
    timer = timer_of(setup.device)
    _warm_sweep(setup, convert)
    one_sweep, (weight, gram, wrapper) = _problem(setup, shape, convert)
    swept = timer.seconds(one_sweep)
    products = _products(lambda: products_seconds(weight, gram, wrapper, timer.seconds))
    return {"sweep s": swept, "its products s": products, "ratio": swept / products}


@cache
def _warm_sweep(setup: Setup, convert: Callable[[Tensor], Any]) -> None:
    _problem(setup, WARM, convert)[0]()


def _problem(setup: Setup, shape: Shape, convert: Callable[[Tensor], Any]) -> tuple[Callable[[], object], tuple]:
    """A sweep to be run, and its weight, Gram matrix and left wrapper."""
    weight, gram = map(convert, random_problem(shape, setup.device))
    problem = Problem(weight, FullGram(gram), Pattern(2, 4), setup.wrapper, setup.wrapper)
    factors = problem.identity_wrapped(magnitude(weight))
    return partial(sweep, problem, factors), (weight, gram, factors.left)


def random_problem(shape: Shape, device: str) -> tuple[Tensor, Tensor]:
    """A random weight (d_out, d_in) and the Gram matrix (d_in, d_in) of correlated inputs, float32."""
    d_out, d_in = shape
    generator = torch.Generator(device).manual_seed(0)
    weight = torch.randn(d_out, d_in, device=device, generator=generator)
    inputs = torch.randn(d_in, 2 * d_in, device=device, generator=generator)
    inputs[1:] = inputs[1:] + 0.5 * inputs[:-1]
    return weight, inputs @ inputs.T


def _products(measure: Callable[[], float]) -> float:
    measure()
    return median(measure() for _ in range(PRODUCTS))


def _greedy(setup: Setup, size: int) -> Values:
    timer = timer_of(setup.device)
    _warm_greedy(setup)
    weight, gram = random_problem((size, size), setup.device)
    pruned = timer.seconds(lambda: sparsegpt(weight, gram))
    products = _products(lambda: _greedy_products(timer, weight, gram, setup.wrapper))
    return {"SparseGPT s": pruned, "its products s": products, "ratio": pruned / products}


@cache
def _warm_greedy(setup: Setup) -> None:
    sparsegpt(*random_problem(WARM, setup.device))


def _greedy_products(timer: Timer, weight: Tensor, gram: Tensor, size: int) -> float:
    """The Cholesky factor in float64, half a large product (E V between panels), and one by blocks (within them)."""
    definite = gram.double()
    definite.diagonal().mul_(1.01)
    wrapper = weight[:, :size].reshape(-1, size, size)
    factor = timer.seconds(lambda: torch.linalg.cholesky(definite))
    large = timer.seconds(lambda: weight @ gram)
    return factor + large / 2 + timer.seconds(lambda: wrapper @ blocks.split_rows(weight, size))
