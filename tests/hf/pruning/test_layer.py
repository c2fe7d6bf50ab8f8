"""One layer: its target, its blocks, its losses, and what is recorded on the way."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from armorfact import factorize
from armorfact_hf.model.moments import Moments
from armorfact_hf.model.structure import Layer
from armorfact_hf.pruning.config import PruneConfig
from armorfact_hf.pruning.fitting import fitting_block
from armorfact_hf.pruning.layer import _target, prune_layer, shrunk
from armorfact_hf.pruning.losses import energy, exact_weight
from armorfact_hf.pruning.notes import damping_noted
from armorfact_hf.pruning.side_by_side import prune_layers
from tests.hf.threads import computing_with

D_OUT, D_IN = 16, 24


def problem(seed=0, tokens=200, dtype=torch.float32, noise=0.3):
    """A layer, inputs of the dense model, and the same inputs disturbed."""
    torch.manual_seed(seed)
    linear = nn.Linear(D_IN, D_OUT, dtype=dtype)
    dense = torch.randn(tokens, D_IN, dtype=torch.float64) @ torch.randn(D_IN, D_IN, dtype=torch.float64)
    pruned = dense + noise * torch.randn_like(dense)
    return Layer("layers.0.up", linear, 0, block=(8, 8)), dense, pruned


def moments_of(dense, pruned):
    return Moments(pruned.T @ pruned, dense.T @ pruned, len(pruned))


@given(st.integers(0, 10**6), st.sampled_from([0.0, 0.1, 1.0]))
def test_the_output_target_is_the_minimizer_of_what_it_stands_for(seed, shrinkage):
    layer, dense, pruned = problem(seed)
    config = PruneConfig(target="output", shrinkage=shrinkage)
    found = _target(layer.weight.double(), moments_of(dense, pruned), config)
    # Brute force: least squares of [W X_dense, sqrt(λ) W D] by [X, sqrt(λ) D], D the root of diag(H).
    root = (max(shrinkage, 1e-6) * pruned.square().sum(0)).sqrt().diag()
    weight = layer.weight.double()
    wanted = torch.cat([dense @ weight.T, root @ weight.T])
    best = torch.linalg.lstsq(torch.cat([pruned, root]), wanted).solution.T
    torch.testing.assert_close(found, best, rtol=1e-4, atol=1e-5)


def test_with_dense_inputs_the_output_target_is_the_weight():
    layer, dense, _ = problem()
    found = _target(layer.weight, moments_of(dense, dense), PruneConfig(target="output"))
    torch.testing.assert_close(found, layer.weight)


def test_channels_without_energy_keep_their_weight_in_the_target():
    layer, dense, pruned = problem()
    pruned = pruned.clone()
    pruned[:, 3] = 0
    found = _target(layer.weight, moments_of(dense, pruned), PruneConfig(target="output", shrinkage=0.0))
    assert torch.isfinite(found).all()
    torch.testing.assert_close(found[:, 3], layer.weight[:, 3])


def test_shrinkage_acts_on_the_diagonal_alone():
    gram = torch.tensor([[2.0, 1.0], [1.0, 3.0]])
    assert torch.equal(shrunk(gram, 0.5), torch.tensor([[3.0, 1.0], [1.0, 4.5]]))
    assert torch.equal(gram, torch.tensor([[2.0, 1.0], [1.0, 3.0]]))


@given(
    st.integers(0, 10**6),
    st.sampled_from(["gram", "diagonal", "nowag"]),
    st.sampled_from(["sparsegpt", "wanda", "nowag", "magnitude"]),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_the_objective_never_ends_above_its_start(seed, objective, init, dtype):
    layer, dense, pruned = problem(seed, dtype=dtype)
    config = PruneConfig(objective=objective, init=init, sweeps=3, block=8)
    layer_pruned, report = prune_layer(layer, moments_of(dense, pruned), config)
    assert report.objective_loss <= report.objective_initial_loss
    assert layer_pruned.values.dtype == dtype
    residual = layer.weight.double() - layer_pruned.weight.double()
    expected = (pruned @ residual.T).square().sum() / (pruned @ layer.weight.double().T).square().sum()
    # The report's loss comes from a product in float64; the layer's own weight is rounded to its dtype once more.
    assert report.losses["armorfact"] == pytest.approx(float(expected), rel=1e-3 if dtype == torch.float32 else 0.2)


def test_with_no_shrinkage_it_is_never_above_sparsegpt():
    layer, dense, pruned = problem()
    _, report = prune_layer(layer, moments_of(dense, pruned), PruneConfig(shrinkage=0.0, block=8))
    assert report.losses["armorfact"] <= report.losses["sparsegpt"]
    assert report.objective_initial_loss == pytest.approx(report.losses["sparsegpt"], rel=1e-4)


@pytest.mark.parametrize("method", ["sparsegpt", "wanda", "nowag", "magnitude"])
def test_one_shot_methods_store_a_core_alone(method):
    layer, dense, pruned = problem()
    config = PruneConfig(method=method, baselines=("sparsegpt", "wanda", "nowag", "magnitude"))
    layer_pruned, report = prune_layer(layer, moments_of(dense, pruned), config)
    assert layer_pruned.block is None and report.block is None and report.sweeps == 0
    assert set(report.losses) == {"sparsegpt", "wanda", "nowag", "magnitude"}
    ours, other = (prune_layer(layer, moments_of(dense, pruned), c)[1] for c in (config, PruneConfig(block=8)))
    assert method == "magnitude" or ours.losses[method] == pytest.approx(other.losses[method])


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "magnitude"},
        {"method": "wanda"},
        {"method": "nowag"},
        {"objective": "nowag", "init": "nowag", "block": 8},
        {"objective": "diagonal", "init": "wanda", "block": 8},
    ],
)
def test_losses_are_of_the_whole_gram_matrix_whatever_a_method_looks_at(settings):
    layer, dense, pruned = problem()
    moments = moments_of(dense, pruned)
    given = PruneConfig(**settings, baselines=())
    replacement, report = prune_layer(layer, moments, given)
    residual = layer.weight.double() - exact_weight(replacement)
    expected = energy(residual, moments.gram) / energy(layer.weight, moments.gram)
    diagonal = moments.gram.diagonal().diag()
    assert report.losses == {given.method: pytest.approx(expected)}
    assert expected != pytest.approx(energy(residual, diagonal) / energy(layer.weight, diagonal), rel=1e-2)


def test_the_papers_objective_is_a_baseline():
    layer, dense, pruned = problem()
    moments = moments_of(dense, pruned)
    losses = prune_layer(layer, moments, PruneConfig(baselines=("paper",), block=8))[1].losses
    diagonal = moments.gram.diagonal().float()
    alone = factorize(layer.weight, diagonal, block=8, init="nowag", normalize="nowag", max_sweeps=300, rtol=1e-4)
    residual = layer.weight.double() - alone.dense().double()
    whole = energy(layer.weight, moments.gram)
    assert losses["paper"] == pytest.approx(energy(residual, moments.gram) / whole, rel=1e-4)


def test_energy_is_the_squared_norm_of_the_outputs():
    _, dense, _ = problem()
    residual = torch.randn(D_OUT, D_IN, dtype=torch.float64)
    assert energy(residual, dense.T @ dense) == pytest.approx(float((dense @ residual.T).square().sum()))


def test_damping_is_noted_at_the_layer_that_needed_it_and_nowhere_else():
    layer, dense, pruned = problem()
    good = moments_of(dense, pruned)
    config = PruneConfig(method="sparsegpt", baselines=("wanda",))
    indefinite = Moments(good.gram - 1.2 * torch.linalg.eigvalsh(good.gram)[4] * torch.eye(D_IN), None, 10)
    with damping_noted():
        (_, first), (_, second) = prune_layers([(layer, indefinite), (replace(layer, name="other"), good)], config)
    assert len(first.notes) == 1 and "damping was doubled" in first.notes[0]
    assert second.notes == ()


def test_side_by_side_is_the_same_as_one_after_the_other():
    torch.manual_seed(0)
    work = []
    for k in range(4):
        layer, dense, pruned = problem(k)
        work.append((replace(layer, name=str(k)), moments_of(dense, pruned)))
    told = []
    with computing_with(4):
        together = prune_layers(work, PruneConfig(block=8, sweeps=3), lambda layer, report: told.append(report.name))
        assert torch.get_num_threads() == 4
    assert sorted(told) == list("0123")
    for (layer, moments), (pruned, report) in zip(work, together, strict=True):
        alone, _ = prune_layer(layer, moments, PruneConfig(block=8, sweeps=3))
        assert report.name == layer.name
        torch.testing.assert_close(pruned.weight, alone.weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "settings", "expected"),
    [
        ((576, 576), {}, (36, 36)),
        ((4096, 4096), {}, (128, 128)),
        ((11008, 4096), {}, (128, 128)),
        ((32, 32), {}, (4, 4)),
        ((576, 576), {"block": 64}, (64, 64)),
        ((576, 576), {"block": 128}, None),
        ((576, 578), {}, None),
        ((13, 32), {}, None),
        ((64, 64), {"pattern": "4:8", "block": 4}, None),
    ],
)
def test_blocks_divide_the_layer_and_stay_light(shape, settings, expected):
    block, reason = fitting_block(shape, PruneConfig(**settings))
    assert block == expected
    assert bool(reason) == (expected is None)


def test_a_bad_weight_is_named():
    layer, dense, pruned = problem()
    layer.module.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"layers\.0\.up: W has 1 NaN"):
        prune_layer(layer, moments_of(dense, pruned), PruneConfig(block=8))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"shrinkage": 0.25},
        {"objective": "diagonal"},
        {"objective": "nowag"},
        {"objective": "normalized"},
        {"objective": "normalized", "shrinkage": 0.25},
        {"init": "wanda"},
        {"rtol": 0.5},
        {"sweeps": 1},
        {"pattern": "1:4"},
    ],
    ids=lambda settings: " ".join(map(str, settings.values())) or "defaults",
)
def test_a_layer_is_factorized_as_the_settings_say(settings):
    layer, dense, pruned = problem()
    moments = moments_of(dense, pruned)
    config = PruneConfig(**{"block": 8, "sweeps": 9} | settings)
    gram = moments.gram + settings.get("shrinkage", 1.0) * moments.gram.diagonal().diag()
    expected = factorize(
        layer.weight,
        (moments.gram.diagonal() if settings.get("objective") in ("diagonal", "nowag") else gram).float(),
        block=8,
        pattern=config.pattern,
        init=config.init,
        normalize="nowag" if settings.get("objective") in ("nowag", "normalized") else None,
        max_sweeps=config.sweeps,
        rtol=config.rtol,
    )
    found, report = prune_layer(layer, moments, config)
    assert torch.equal(exact_weight(found), expected.factors.astype(torch.float64).dense())
    assert report.sweeps == expected.history[-1].number
    if settings:
        other, _ = prune_layer(layer, moments, PruneConfig(block=8, sweeps=9))
        assert not torch.equal(exact_weight(found), exact_weight(other))
