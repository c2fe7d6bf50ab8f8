"""Which safetensors files a folder holds, and the index that lists them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from armorfact_hf.checkpoint.damage import AGAIN

WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


def shards(folder: Path) -> list[Path]:
    """The safetensors files of a folder: the one of a whole model, or those that its index lists if it has one.

    Raises:
        ValueError: no file, one of the index is missing or outside of the folder, a damaged index.
    """
    if (index := index_of(folder)) is not None:
        names = sorted(set(weight_map(index).values()))
    elif (folder / WHOLE).is_file():
        names = [WHOLE]
    else:
        names = sorted(path.name for path in folder.glob("*.safetensors"))
    if absent := [name for name in names if not (folder / name).is_file()]:
        raise ValueError(f"{folder} lacks {', '.join(absent)}, which its index lists: {AGAIN}")
    if not names:
        raise ValueError(f"{folder} holds no safetensors file: save the model there with `save_pretrained`")
    return [folder / name for name in names]


def index_of(folder: Path) -> Path | None:
    """The index of a folder, if it has one that counts.

    A whole model is saved over a cut one without the old index being taken away; transformers reads the former.
    """
    index = folder / INDEX
    return index if index.exists() and not (folder / WHOLE).is_file() else None


def weight_map(index: Path) -> dict[str, str]:
    """The name of its file for each tensor, as the index has it.

    Raises:
        ValueError: a damaged index, or one that names a file outside of its folder.
    """
    try:
        found = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = set(found.values())
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{index} is damaged ({error!r}): {AGAIN}") from error
    for name in names:
        if not _is_file_name(name):
            raise ValueError(f"{index} lists {name!r}: expected names of files in its own folder; {AGAIN}")
    return found


def _is_file_name(name: Any) -> bool:
    """Whether it can only be a file in the folder itself, on every system."""
    if not isinstance(name, str) or not name.isprintable() or set(name) & set("/\\:"):
        return False
    return name not in ("", ".", "..") and len(name.encode()) < 256
