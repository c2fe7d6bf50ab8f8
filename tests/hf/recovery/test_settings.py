"""Settings are checked at once; the rate rises and falls as they say."""

from __future__ import annotations

import pytest

from armorfact_hf.recovery.settings import RecoverySettings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train": "norms"}, "train must be one of factors, wrappers, got 'norms'"),
        ({"steps": 0}, "steps must be a whole number of at least 1, got 0"),
        ({"steps": 2.5}, "steps must be a whole number"),
        ({"steps": True}, "steps must be a whole number"),
        ({"warm_up": None}, "warm_up must be a whole number of at least 0, got None"),
        ({"measure_every": 0}, "measure_every must be"),
        ({"seed": -1}, "seed must be"),
        ({"rate": 0}, "rate must be a positive number, got 0"),
        ({"rate": float("nan")}, "rate must be a positive number, got nan"),
        ({"rate": "fast"}, "rate must be a positive number, got 'fast'"),
    ],
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        RecoverySettings(**settings)


def test_the_rate_rises_then_falls_to_a_tenth():
    rates = [RecoverySettings(rate=1.0, warm_up=10).rate_at(step, 50) for step in range(51)]
    assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert rates[10] == 1 and rates[30] == pytest.approx(0.55) and rates[50] == pytest.approx(0.1)
    assert rates[10:] == sorted(rates[10:], reverse=True)


@pytest.mark.parametrize("steps", [1, 5, 10])
def test_a_run_shorter_than_the_warm_up_has_rates(steps):
    assert all(0 < RecoverySettings().rate_at(step, steps) <= RecoverySettings().rate for step in range(steps))
