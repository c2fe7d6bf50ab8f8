"""A folder that holds a tiny model, a text for it, and an empty cache."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers.utils import logging as transformers_logging

from tests.hf.models import random_text, tiny_model, word_tokenizer


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    """A folder with a tiny Llama and its tokenizer."""
    folder = tmp_path / "model"
    tiny_model("llama").save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    """A file of 400 words."""
    path = tmp_path / "text.txt"
    path.write_text(random_text(400), encoding="utf-8")
    return path


@pytest.fixture
def own_cache(tmp_path_factory, monkeypatch):
    """An empty cache, no network, and no bars of transformers."""
    monkeypatch.setenv("ARMORFACT_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    transformers_logging.disable_progress_bar()
