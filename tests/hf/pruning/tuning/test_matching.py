"""Block matching: the error on the windows kept aside never rises, supports stay, what goes wrong is undone."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from armorfact import factorize
from armorfact_hf.layers.linear import FactorizedLinear
from armorfact_hf.layers.stack import master_of
from armorfact_hf.pruning.schedule import FACTORS, LEAST, WARM_UP, Matching, kept_aside
from armorfact_hf.pruning.tuning import matching
from armorfact_hf.pruning.tuning.aims import StateAim, relative_error
from armorfact_hf.pruning.tuning.matching import match_block_
from armorfact_hf.pruning.tuning.muon import Muon

QUICK = Matching(passes=4, rate=5e-3)


class Block(nn.Module):
    """Two layers and a residual, as a decoder block has them."""

    def __init__(self, up: nn.Module, down: nn.Module) -> None:
        super().__init__()
        self.up, self.down = up, down

    def forward(self, x):
        return x + self.down(nn.functional.silu(self.up(x)))


@pytest.fixture
def states():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, 12, 16, generator=generator) for _ in range(8)]


def pruned(linear: nn.Linear, states, dtype) -> FactorizedLinear:
    x = torch.cat(states).flatten(0, 1)
    size = linear.in_features
    gram = x.T @ x if x.shape[1] == size else torch.eye(size)
    found = factorize(linear.weight.detach(), gram, block=4, max_sweeps=2)
    return FactorizedLinear.of(found.core, found.left, found.right, linear.bias.detach()).to(dtype)


@pytest.fixture(params=[torch.float64, torch.float32, torch.bfloat16], ids=["float64", "float32", "bfloat16"])
def block_and_targets(request, states):
    torch.manual_seed(1)
    dense = Block(nn.Linear(16, 32), nn.Linear(32, 16)).requires_grad_(False)
    targets = [dense(x) for x in states]
    layers = {name: pruned(getattr(dense, name), states, request.param) for name in ("up", "down")}
    return Block(**layers), layers, [target.to(request.param) for target in targets]


def run(block, states, layers):
    dtype = layers["up"].values.dtype

    def runs(window):
        return block(states[window].to(dtype))

    return runs


def aside_error(block, states, layers, targets):
    runs = run(block, states, layers)
    with torch.no_grad():
        weights = StateAim(runs, targets).weights
        return float(torch.stack([relative_error(runs(k), targets[k], weights) for k in kept_aside(8)]).mean())


def test_the_error_on_windows_kept_aside_falls_and_is_that_of_the_stored_layers(block_and_targets, states):
    block, layers, targets = block_and_targets
    before = aside_error(block, states, layers, targets)
    tuned, report = match_block_(block, layers, StateAim(run(block, states, layers), targets), QUICK, 0)
    assert report.before == before
    assert report.kept and report.after < before
    assert report.after == aside_error(block, states, layers, targets)
    for name, layer in layers.items():
        assert getattr(block, name) is tuned[name]
        assert tuned[name].values.dtype == layer.values.dtype
        assert not any(parameter.requires_grad for parameter in tuned[name].parameters())
        assert not torch.equal(tuned[name].values, layer.values)


def test_supports_stay(block_and_targets, states):
    block, layers, targets = block_and_targets
    tuned, _ = match_block_(block, layers, StateAim(run(block, states, layers), targets), QUICK, 0)
    for name, layer in layers.items():
        assert torch.equal(tuned[name].positions, layer.positions)


def test_columns_of_the_left_wrapper_and_rows_of_the_right_one_have_unit_norm(block_and_targets, states):
    block, layers, targets = block_and_targets
    tuned, _ = match_block_(block, layers, StateAim(run(block, states, layers), targets), QUICK, 0)
    for layer in tuned.values():
        tolerance = {"rtol": 0, "atol": 1e-2 if layer.values.dtype == torch.bfloat16 else 1e-5}
        for norms in (layer.left.float().norm(dim=-2), layer.right.float().norm(dim=-1)):
            torch.testing.assert_close(norms, torch.ones_like(norms), **tolerance)


def test_the_same_call_gives_the_same_bits(block_and_targets, states):
    block, layers, targets = block_and_targets
    first, _ = match_block_(block, layers, StateAim(run(block, states, layers), targets), QUICK, 3)
    for name, layer in layers.items():
        block.set_submodule(name, layer)
    second, _ = match_block_(block, layers, StateAim(run(block, states, layers), targets), QUICK, 3)
    for name in layers:
        for key, tensor in first[name].state_dict().items():
            assert torch.equal(tensor, second[name].state_dict()[key])


class Scaled(nn.Module):
    """A layer whose output is multiplied with a number."""

    def __init__(self, layer: nn.Module, factor: float) -> None:
        super().__init__()
        self.layer, self.factor = layer, factor

    def forward(self, x):
        return self.layer(x) * self.factor


def test_the_size_of_weights_does_not_matter(block_and_targets, states):
    _, layers, targets = block_and_targets
    large = copy.deepcopy(layers["down"])
    large.bias = None
    with torch.no_grad():
        large.values.mul_(64)
    layers["down"].bias = None
    found = []
    for layer, factor in ((layers["down"], 1.0), (large, 1 / 64)):
        held = Block(layers["up"], Scaled(layer, factor))
        given = {"up": layers["up"], "down.layer": layer}
        tuned, report = match_block_(held, given, StateAim(run(held, states, layers), targets), QUICK, 0)
        found.append((tuned["down.layer"].values.float() * factor, report.after))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-2, atol=1e-4)
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-3)


def test_biases_stay(block_and_targets, states):
    block, layers, targets = block_and_targets
    tuned, _ = match_block_(block, layers, StateAim(run(block, states, layers), targets), QUICK, 0)
    assert all(torch.equal(tuned[name].bias, layer.bias) for name, layer in layers.items())


def test_a_rate_that_ruins_the_block_leaves_it_as_it_was(block_and_targets, states):
    block, layers, targets = block_and_targets
    found, report = match_block_(block, layers, StateAim(run(block, states, layers), targets), Matching(1, 10.0), 0)
    assert not report.kept and report.after > report.before
    assert all(found[name] is layer and getattr(block, name) is layer for name, layer in layers.items())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_is_undone_at_half_the_rate(block_and_targets, states, bad):
    block, layers, targets = block_and_targets
    runs, calls = run(block, states, layers), []

    def sometimes(window):
        if torch.is_grad_enabled():
            calls.append(window)
        return runs(window) * (bad if torch.is_grad_enabled() and len(calls) == 5 else 1.0)

    tuned, report = match_block_(block, layers, StateAim(sometimes, targets), QUICK, 0)
    assert report.kept
    assert report.notes == ("step 5 of matching was not finite: the one before was undone, and the rate halved",)
    assert all(tensor.isfinite().all() for layer in tuned.values() for tensor in layer.parameters())


def test_a_last_step_that_ends_in_no_finite_distance_is_undone(block_and_targets, states, monkeypatch):
    block, layers, targets = block_and_targets
    steps, seen = QUICK.steps(len(targets)), []

    class Ruined(Muon):
        def step_(self, rate):
            super().step_(rate)
            seen.append({name: parameter.detach().clone() for name, parameter in self.parameters.items()})
            if len(seen) == steps:
                next(iter(self.parameters.values())).data.fill_(float("nan"))

    monkeypatch.setattr(matching, "Muon", Ruined)
    tuned, report = match_block_(block, layers, StateAim(run(block, states, layers), targets), QUICK, 0)
    assert report.kept and report.after < report.before
    assert report.notes == ("what matching ended with was not finite: its last step was undone",)
    for name, layer in tuned.items():  # the canonical gauge changes factors, and not their product
        before = master_of(layers[name])
        for part in FACTORS:
            getattr(before, part).data.copy_(seen[-2][f"{name}.{part}"])
        tolerance = {torch.bfloat16: 0.05}.get(layer.values.dtype, 1e-4)
        torch.testing.assert_close(layer.weight.float(), before.weight.float(), rtol=tolerance, atol=tolerance)
        assert not torch.equal(layer.weight, layers[name].weight)


def test_a_block_without_a_finite_distance_afterwards_keeps_its_factors(block_and_targets, states):
    block, layers, targets = block_and_targets
    runs, calls = run(block, states, layers), []

    def worse(window):
        if torch.is_grad_enabled():
            calls.append(window)
        return runs(window) * (float("nan") if calls and not torch.is_grad_enabled() else 1.0)

    found, report = match_block_(block, layers, StateAim(worse, targets), QUICK, 0)
    assert (report.kept, report.after) == (False, None) and report.notes
    assert all(found[name] is layer for name, layer in layers.items())


def test_what_led_to_a_step_that_is_not_finite_is_forgotten(block_and_targets, states, monkeypatch):
    """The factors are those of two steps before, and smaller steps follow."""
    block, layers, targets = block_and_targets
    runs, seen, rates = run(block, states, layers), [], []

    class Watched(Muon):
        def zero_gradients_(self):
            seen.append({name: parameter.detach().clone() for name, parameter in self.parameters.items()})
            super().zero_gradients_()

        def step_(self, rate):
            rates.append(rate)
            super().step_(rate)

        @property
        def finite(self):
            return super().finite and len(seen) != 5  # the distance is finite, and its gradient is not

    monkeypatch.setattr(matching, "Muon", Watched)
    match_block_(block, layers, StateAim(runs, targets), QUICK, 0)
    assert all(torch.equal(tensor, seen[3][name]) for name, tensor in seen[5].items())
    assert not all(torch.equal(tensor, seen[3][name]) for name, tensor in seen[4].items())
    steps = QUICK.steps(len(targets))
    assert rates == [QUICK.rate_at(k, steps) / (2 if k > 4 else 1) for k in range(steps) if k != 4]


def test_a_block_that_is_never_finite_is_left_as_it_was(block_and_targets, states):
    block, layers, targets = block_and_targets
    runs = run(block, states, layers)

    def never(window):
        return runs(window) * (float("nan") if torch.is_grad_enabled() else 1)

    found, report = match_block_(block, layers, StateAim(never, targets), QUICK, 0)
    assert not report.kept and len(report.notes) == matching.MOST_HALVINGS + 1
    assert found == layers


def test_layers_without_wrappers_are_tuned_too(states):
    torch.manual_seed(1)
    dense = Block(nn.Linear(16, 32), nn.Linear(32, 16)).requires_grad_(False)
    targets = [dense(x) for x in states]
    layers = {}
    for name in ("up", "down"):
        held = pruned(getattr(dense, name), states, torch.float32)
        layers[name] = FactorizedLinear.of(held.core, bias=held.bias)
    block = Block(**layers)
    _, report = match_block_(block, layers, StateAim(run(block, states, layers), targets), QUICK, 0)
    assert report.kept


def test_a_block_that_takes_no_mixed_precision_is_tuned_without_or_left_alone(block_and_targets, states):
    block, layers, targets = block_and_targets
    runs = run(block, states, layers)

    def by_hand(window):
        if torch.is_autocast_enabled("cpu"):
            raise RuntimeError("index_put wants one dtype")
        return runs(window)

    found, report = match_block_(block, layers, StateAim(by_hand, targets), QUICK, 0)
    if layers["up"].values.dtype in (torch.float32, torch.float64):
        assert report.kept and report.notes == ()
    else:
        assert not report.kept and report.notes == (matching.NOT_MIXED,)
        assert found == layers


@pytest.mark.parametrize(("windows", "expected"), [(1, []), (2, [1]), (7, [6]), (8, [7]), (16, [7, 15]), (17, [7, 15])])
def test_one_window_in_eight_is_kept_aside(windows, expected):
    assert list(kept_aside(windows)) == expected


def test_the_error_is_relative_for_each_token():
    target = torch.tensor([[[3.0, 4.0], [300.0, 400.0]]])
    output = target + torch.tensor([[[5.0, 0.0], [0.0, 5.0]]])
    assert relative_error(output, target, torch.ones(2)) == pytest.approx((1 + 1e-4) / 2)


def test_every_channel_counts_on_its_own_scale():
    targets = [torch.randn(1, 6, 5) for _ in range(3)]
    outputs = [target + 0.1 * torch.randn(1, 6, 5) for target in targets]
    scales = torch.tensor([1.0, 1e3, 1e-2, 5.0, 300.0])
    aim = StateAim(outputs.__getitem__, targets)
    scaled = StateAim(outputs.__getitem__, [target * scales for target in targets])
    energy = torch.cat(targets).double().square().mean((0, 1))
    for window, (output, target) in enumerate(zip(outputs, targets, strict=True)):
        error, whole = ((output - target).double() ** 2 / energy).sum(-1), (target.double() ** 2 / energy).sum(-1)
        assert aim.distance(output, window) == pytest.approx(float((error / whole).mean()), rel=1e-5)
        assert scaled.distance(output * scales, window) == pytest.approx(aim.distance(output, window), rel=1e-4)


def test_a_silent_channel_makes_no_weight_infinite():
    target = torch.randn(1, 6, 5) * torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0])
    aim = StateAim([target].__getitem__, [target])
    assert aim.weights.isfinite().all() and aim.distance(target, 0) == 0
    assert StateAim([0 * target].__getitem__, [0 * target]).distance(0 * target, 0) == 0


def test_the_rate_rises_and_falls_below_what_was_asked_for():
    matching = Matching(passes=3, rate=1.0)
    rates = [matching.rate_at(step, 42) for step in range(42)]
    assert rates[0] == pytest.approx(1 / WARM_UP) and max(rates) == rates[WARM_UP - 1]
    assert 0.97 < max(rates) < 1 and rates[WARM_UP - 1 :] == sorted(rates[WARM_UP - 1 :], reverse=True)
    assert LEAST < rates[-1] < LEAST + 0.01
