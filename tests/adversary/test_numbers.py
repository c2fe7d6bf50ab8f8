"""`factorize` on matrices of every rank, condition and scale: what is returned is finite, bounded, and no worse."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

from armorfact import factorize, sparsegpt
from armorfact.problem import MOST_GROWTH
from tests.adversary.soak import Soak

ZEROS = ("negative losses", "losses misreported", "losses above SparseGPT's", "entries too large", "errors")
DTYPES = ("float16", "bfloat16", "float32", "float64")
DEEPEST = {"float16": 6, "bfloat16": 90, "float32": 90, "float64": 100}  # powers of two that W is scaled by


def inputs(rng: np.random.Generator, size: int) -> np.ndarray:
    """Inputs of random rank; their channels' energies spread over up to 1e14."""
    rank = int(rng.integers(1, 2 * size))
    spread = np.logspace(0, rng.uniform(-7, 0), size)[rng.permutation(size), None]
    mixed = rng.standard_normal((size, size)) if rng.random() < 0.5 else np.eye(size)
    return mixed @ (spread * rng.standard_normal((size, rank)))


def problem(seed: int) -> tuple[torch.Tensor, torch.Tensor, dict]:
    rng = np.random.default_rng(seed)
    dtype = str(rng.choice(DTYPES))
    d_out, d_in, block = 8 * int(rng.integers(1, 7)), 8 * int(rng.integers(1, 7)), int(rng.choice([4, 8]))
    weight = rng.standard_normal((d_out, d_in)) * 2.0 ** int(rng.integers(-DEEPEST[dtype], DEEPEST[dtype]))
    x = inputs(rng, d_in)
    gram = torch.from_numpy(x @ x.T * 2.0 ** int(rng.integers(-60, 60)))
    gram = gram if dtype == "float64" or rng.random() < 0.5 else gram.float()
    solver = str(rng.choice(["exact", "exact", "gradient"]))
    return torch.from_numpy(weight).to(getattr(torch, dtype)), gram, {"block": block, "solver": solver, "max_sweeps": 6}


def true_loss(weight: torch.Tensor, found: torch.Tensor, gram: torch.Tensor) -> float:
    """tr(R H R') in float64."""
    residual = weight.double() - found.double()
    return float(((residual @ gram.double()) * residual).sum())


def faults(weight: torch.Tensor, gram: torch.Tensor, settings: dict) -> list[str]:
    """What is wrong with the factors of one problem, measured apart from what they say of themselves."""
    try:
        start = sparsegpt(weight, gram)
        result = factorize(weight, gram, **settings)
    except (ArithmeticError, ValueError, RuntimeError) as error:
        return [f"errors: {error}"]
    left, core, right = (x.double() for x in (result.factors.left, result.factors.core, result.factors.right))
    found = torch.block_diag(*left) @ core @ torch.block_diag(*right)
    energy = true_loss(weight, torch.zeros_like(weight), gram)
    larger = true_loss(weight, found, gram) > true_loss(weight, start, gram) + 1e-14 * energy
    bounded = found.abs().max() <= 1.01 * MOST_GROWTH * weight.double().abs().max()
    lower = true_loss(weight, found, gram)
    told = abs(result.loss - max(lower, 0.0)) <= 1e-6 * abs(lower) + 1e-13 * energy
    # A rounded H has negative eigenvalues, as far as a matrix of so many roundings can have them.
    rounding = torch.finfo(gram.dtype).eps * gram.shape[0] * gram.double().diagonal()
    negative = lower < -float(((weight.double() - found).square() * rounding).sum())
    wrong = [negative, not told, larger, not bounded]
    return [what for what, happened in zip(ZEROS, wrong, strict=False) if happened]


def soak_numbers(soak: Soak) -> None:
    for seed in soak.seeds():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            wrong = faults(*problem(seed))
        soak.found["problems"] += 1
        for what in wrong:
            soak.found[what.partition(":")[0]] += 1
            print(f"seed {seed}: {what}")
    soak.close(*ZEROS)


def test_forty_problems():
    soak_numbers(Soak("problems", 40, 30))


@pytest.mark.slow
def test_many_problems():
    soak_numbers(Soak.long("problems", 20_000))
