"""A folder that holds a tiny model, and a text for it."""

from __future__ import annotations

from pathlib import Path

import pytest

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
