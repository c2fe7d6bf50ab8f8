"""Adam is PyTorch's, and its last step can be taken back."""

from __future__ import annotations

import torch
from torch import nn

from armorfact_hf.recovery.adam import BETAS, Adam

START = torch.linspace(-1, 1, 6, dtype=torch.float64)


def descend(adam: Adam, rates: list[float]) -> list[torch.Tensor]:
    """Steps down Σ x⁴ of the parameter "x", which is returned before each of them and at the end."""
    x, path = adam.parameters["x"], []
    for rate in rates:
        path.append(x.detach().clone())
        adam.zero_gradients_()
        (x**4).sum().backward()
        adam.step_(rate)
    return [*path, x.detach().clone()]


def test_steps_are_those_of_pytorch():
    rates, unit = [0.1, 0.03, 0.07, 0.01], 0.7
    x = nn.Parameter(START.clone())
    theirs = torch.optim.AdamW([x], betas=BETAS, weight_decay=0.0)
    for rate in rates:
        theirs.param_groups[0]["lr"] = unit * rate
        theirs.zero_grad()
        (x**4).sum().backward()
        theirs.step()
    ours = descend(Adam({"x": nn.Parameter(START.clone())}, {"x": unit}), rates)[-1]
    torch.testing.assert_close(ours, x.detach(), rtol=1e-12, atol=1e-12)


def test_the_last_step_is_taken_back_once():
    adam = Adam({"x": nn.Parameter(START.clone())}, {"x": 1.0})
    *_, before, after = descend(adam, [0.1, 0.03, 0.07])
    assert (before - after).abs().min() > 1e-3
    for _ in range(2):
        adam.undo_()
        torch.testing.assert_close(adam.parameters["x"].detach(), before, rtol=0, atol=1e-14)


def test_nothing_is_taken_back_before_the_first_step():
    adam = Adam({"x": nn.Parameter(START.clone())}, {"x": 1.0})
    adam.undo_()
    assert torch.equal(adam.parameters["x"], START)
