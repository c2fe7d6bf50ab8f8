"""The long forms run only when they are asked for: `make soak`."""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "slow" not in config.option.markexpr:
        for item in items:
            if "adversary" in item.path.parts and item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="takes hours: `make soak`"))
