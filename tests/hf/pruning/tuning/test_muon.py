"""Muon: every direction in a tile moves alike, and the last step can be taken back."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from armorfact_hf.pruning.tuning.muon import MOMENTUM, TILE, Muon, direction, orthogonal, unit

SIZES = st.one_of(st.integers(1, 40), st.sampled_from([64, 96, 128, 130, 192]))


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_values(values: list[float], rows: int, columns: int, seed: int) -> Tensor:
    """A matrix with these singular values."""
    left, right = (torch.linalg.qr(random(seed + k, n, len(values)))[0] for k, n in enumerate((rows, columns)))
    return left @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ right.mT


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    values=st.lists(st.floats(0.05, 1.0), min_size=1, max_size=8),
    scale=st.sampled_from([1e-30, 1.0, 1e20]),
    more=st.tuples(st.integers(0, 5), st.integers(0, 5)),
    seed=st.integers(0, 99),
)
def test_every_direction_of_a_matrix_becomes_about_as_long(values, scale, more, seed):
    matrix = with_values(values, len(values) + more[0], len(values) + more[1], seed)
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    found = left[:, : len(values)].mT @ orthogonal(scale * matrix) @ right[: len(values)].mT
    lengths = torch.diagonal(found)
    assert float(lengths.min()) > 0.3 and float(lengths.max()) < 1.3
    torch.testing.assert_close(found, torch.diag(lengths), rtol=0, atol=1e-7)


@settings(derandomize=True, deadline=None, max_examples=40)
@given(rows=SIZES, columns=SIZES, lead=st.sampled_from([(), (2,), (2, 3)]), seed=st.integers(0, 99))
def test_tiles_are_made_orthogonal_one_by_one(rows, columns, lead, seed):
    momentum = random(seed, *lead, rows, columns)
    high, wide = (max(k for k in range(1, TILE + 1) if size % k == 0) for size in (rows, columns))
    expected = torch.empty_like(momentum)
    for i in range(0, rows, high):
        for j in range(0, columns, wide):
            tile = momentum[..., i : i + high, j : j + wide]
            expected[..., i : i + high, j : j + wide] = orthogonal(tile) * math.sqrt(max(high, wide))
    found = direction(momentum, torch.ones_like(momentum))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert 0.5 < unit(found) < 1.3


def test_a_tile_that_no_gradient_reaches_stays():
    gradient = random(1, 2, 8, 2 * TILE)
    gradient[1, :, TILE:] = 0
    moved = direction(random(2, 2, 8, 2 * TILE), gradient).ne(0)
    assert moved[0].all() and moved[1, :, :TILE].all() and not moved[1, :, TILE:].any()
    assert not direction(torch.zeros(4, 4), torch.ones(4, 4)).any()


@pytest.mark.parametrize("size", [1.0, 1e-20, 1e-25, 1e-38, 1e-44, 1e30])
def test_the_size_of_a_momentum_does_not_matter(size):
    """That of an expert that no token reaches any more fades step by step, down to numbers whose squares are zero."""
    momentum = size * random(4, 8, 6).float()
    assert orthogonal(momentum).isfinite().all()
    if size > 1e-38:  # below, numbers lose digits
        torch.testing.assert_close(orthogonal(momentum), orthogonal(random(4, 8, 6).float()), rtol=1e-3, atol=1e-3)


def test_a_tile_that_is_reached_once_stays_finite_for_as_long_as_one_likes():
    muon = Muon({"x": nn.Parameter(random(3, 6, 4).float())})
    muon.gradients["x"].fill_(1e-6)
    muon.step_(0.1)
    reached = muon.parameters["x"].detach().clone()
    muon.zero_gradients_()
    for _ in range(500):
        muon.step_(0.1)
    assert torch.equal(muon.parameters["x"], reached)


def descend(muon: Muon, rates: list[float]) -> list[Tensor]:
    """Steps down Σ x⁴ of the parameter "x", which is returned before each of them and at the end."""
    x, path = muon.parameters["x"], []
    for rate in rates:
        path.append(x.detach().clone())
        muon.zero_gradients_()
        (x**4).sum().backward()
        muon.step_(rate)
    return [*path, x.detach().clone()]


def started(start: Tensor | None = None) -> Muon:
    return Muon({"x": nn.Parameter(random(3, 6, 4) if start is None else start.clone())})


def test_a_step_is_the_rate_and_the_unit_times_the_way_of_the_momentum():
    start, rates = 0.7 * random(3, 6, 4), [0.1, 0.03, 0.07]
    muon, size = started(start), unit(start)
    path, momentum = descend(muon, rates), torch.zeros(6, 4, dtype=torch.float64)
    for rate, x, after in zip(rates, path[:-1], path[1:], strict=True):
        momentum = MOMENTUM * momentum + (1 - MOMENTUM) * 4 * x**3
        torch.testing.assert_close(after, x - size * rate * orthogonal(momentum) * 6**0.5, rtol=0, atol=1e-12)


@pytest.mark.parametrize("rates", [[], [0.1], [0.1, 0.03, 0.07]])
def test_the_last_step_is_taken_back_once(rates):
    muon = started()
    path = descend(muon, rates)
    for _ in range(2):
        muon.undo_()
        assert torch.equal(muon.parameters["x"], path[max(len(rates) - 1, 0)])


def test_what_led_to_an_undone_step_is_forgotten():
    muon = started()
    *_, before, _ = descend(muon, [0.1, 0.03])
    muon.undo_()
    afresh = started(before)
    afresh.units = muon.units
    assert torch.equal(descend(muon, [0.05])[-1], descend(afresh, [0.05])[-1])


@pytest.mark.parametrize(("value", "finite"), [(1e300, True), (math.nan, False), (math.inf, False)])
def test_gradients_that_are_not_finite_are_seen(value, finite):
    muon = started()
    muon.gradients["x"][2, 1] = value
    assert muon.finite is finite
