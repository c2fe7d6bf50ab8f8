"""Reads config.json as it stands, strictly: Python's own reader lets the last of two equal keys win, in silence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from armorfact_hf.checkpoint.damage import AGAIN
from armorfact_hf.layers.format import shown

CONFIG = "config.json"
# By which transformers would read other files than those that are looked at here, one of them perhaps a pickle.
REDIRECTIONS = ("transformers_weights", "configuration_files")
DEEPEST = 64  # objects and lists inside each other: far beyond every model's, and far below what Python can recurse


def read_config(path: Path) -> dict[str, Any]:
    """The JSON object in a model's config.json.

    Raises:
        ValueError: the file cannot be read, is no JSON object, is nested too deeply, holds a key twice, or sends
            transformers to other files; the message names file and key.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_without_repeats)
        if not isinstance(found, dict):
            raise ValueError(f"expected an object, got {shown(found)}")
        _check_depth(found)
    except RecursionError as error:
        raise ValueError(f"{path} is damaged (it is nested too deeply): {AGAIN}") from error
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error}): {AGAIN}") from error
    for key in REDIRECTIONS:
        if key in found:
            raise ValueError(f"{path}: {key} names other files to load, which armorfact does not look at: take it out")
    return found


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {shown(key)} is there twice")
        found[key] = value
    return found


def _check_depth(found: dict[str, Any]) -> None:
    level: list[Any] = [found]
    for _ in range(DEEPEST):
        nodes = [node.values() if isinstance(node, dict) else node for node in level if isinstance(node, dict | list)]
        level = [inner for node in nodes for inner in node]
        if not level:
            return
    raise RecursionError
