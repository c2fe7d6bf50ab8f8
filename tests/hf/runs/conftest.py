"""What runs on made-up models need: an empty cache, and a folder to write."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers.utils import logging as transformers_logging


@pytest.fixture
def own_cache(tmp_path_factory, monkeypatch):
    """An empty cache, no network, and no bars of transformers."""
    monkeypatch.setenv("ARMORFACT_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    transformers_logging.disable_progress_bar()


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "pruned"
