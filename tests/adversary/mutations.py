"""Damage of every kind to the files of a pruned model."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

JUNK: list[Any] = [
    None, True, False, 0, -1, 1, 2, 3, 8, 1.5, 10**30, float("nan"), "", "x", "2:4", "1:4", "../x", "float16", "é",
    [], {}, [0, 0], [[[[]]]], {"a": 1}, "0" * 64, "a" * 5000,
]  # fmt: skip


def mutate(folder: Path, source: random.Random) -> str:
    """Damage a file of a folder; says which and how."""
    path = source.choice(sorted(path for path in folder.iterdir() if path.suffix in (".json", ".safetensors")))
    kinds = [_bytes, _structure if path.suffix == ".json" else _header, _file]
    [kind] = source.choices(kinds, weights=[5, 5, 1])
    return f"{path.name}: {kind(path, source)}"


def _bytes(path: Path, source: random.Random) -> str:
    content = bytearray(path.read_bytes())
    for _ in range(source.choice([1, 1, 1, 2, 5])):
        a, b = sorted(source.choices(range(len(content) + 1), k=2))
        b = min(b, a + source.choice([1, 1, 4, 64, 1024]))
        act = source.choice(["flip", "flip", "set", "delete", "insert", "double", "cut", "swap"])
        if act in ("flip", "set") and a < len(content):
            content[a] = content[a] ^ 1 << source.randrange(8) if act == "flip" else source.randrange(256)
        elif act == "delete":
            del content[a:b]
        elif act == "insert":
            content[a:a] = source.randbytes(source.choice([1, 2, 8]))
        elif act == "double":
            content[a:a] = content[a:b]
        elif act == "cut" and source.random() < 0.2:
            del content[a:]
        elif act == "swap":
            content[a:b] = reversed(content[a:b])
    path.write_bytes(content)
    return "bytes"


def _file(path: Path, source: random.Random) -> str:
    others = [other for other in path.parent.iterdir() if other != path]
    act = source.choice(["removed", "empty", "folder", "exchanged", "copied"])
    if act == "exchanged":
        other = source.choice(others)
        mine, theirs = path.read_bytes(), other.read_bytes()
        path.write_bytes(theirs)
        other.write_bytes(mine)
    elif act == "copied":
        source.choice(others).write_bytes(path.read_bytes())
    else:
        path.unlink()
        if act == "empty":
            path.touch()
        elif act == "folder":
            path.mkdir()
    return act


def _header(path: Path, source: random.Random) -> str:
    """The JSON at the head of a safetensors file, its data as it is."""
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    text = _changed(json.loads(content[8:end]), source).encode(errors="surrogatepass")
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[end:])
    return "header"


def _structure(path: Path, source: random.Random) -> str:
    """The JSON of a file; of `config.json` what armorfact wrote, the rest is transformers' own."""
    whole = json.loads(path.read_text(encoding="utf-8"))
    if path.name == "config.json":
        text = json.dumps(whole | {"quantization_config": "HERE"})
        text = text.replace('"HERE"', _changed(whole["quantization_config"], source))
    else:
        text = _changed(whole, source)
    path.write_bytes(text.encode(errors="surrogatepass"))
    return "JSON"


def _changed(tree: Any, source: random.Random) -> str:
    """JSON text with one to three changes at random places."""
    text = ""
    for _ in range(source.choice([1, 1, 1, 2, 3])):
        place, key = source.choice(list(_places(tree)) or [({"": None}, "")])
        text = source.choice(CHANGES)(place, key, tree, source) or text
    return text or json.dumps(tree)


def _places(tree: Any) -> list[tuple[Any, Any]]:
    """Every container with every key of it."""
    keys = list(tree) if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else []
    return [pair for key in keys for pair in [(tree, key), *_places(tree[key])]]


def _junk(place: Any, key: Any, tree: Any, source: random.Random) -> None:
    place[key] = source.choice(JUNK)


def _drop(place: Any, key: Any, tree: Any, source: random.Random) -> None:
    del place[key]


def _nudge(place: Any, key: Any, tree: Any, source: random.Random) -> None:
    value = place[key]
    if type(value) is int:
        place[key] = value + source.choice([-4, -1, 1, 4, value])
    elif isinstance(value, str) and value:
        at = source.randrange(len(value))
        place[key] = value[:at] + source.choice("0aA:./ ") + value[at + 1 :]
    elif isinstance(value, list):
        place[key] = value[::-1]


def _copy(place: Any, key: Any, tree: Any, source: random.Random) -> None:
    other, name = source.choice(_places(tree))
    place[key] = json.loads(json.dumps(other[name]))


def _rename(place: Any, key: Any, tree: Any, source: random.Random) -> None:
    if isinstance(place, dict):
        names = [key + "x", key[:-1], source.choice(_places(tree))[1]]
        place[str(source.choice(names))] = place.pop(key)


def _deep(place: Any, key: Any, tree: Any, source: random.Random) -> str:
    place[key] = "DEEP"
    depth = source.choice([50, 5000, 200_000])
    return json.dumps(tree).replace('"DEEP"', "[" * depth + "]" * depth, 1)


def _twice(place: Any, key: Any, tree: Any, source: random.Random) -> str | None:
    """The same key twice in one object."""
    if not isinstance(place, dict):
        return None
    held, place[key] = json.dumps(place[key]), "TWICE"
    other = source.choice([held, json.dumps(source.choice(JUNK))])
    pair = source.sample([held, other], 2)
    return json.dumps(tree).replace('"TWICE"', f"{pair[0]}, {json.dumps(key)}: {pair[1]}", 1)


CHANGES: list[Callable[..., str | None]] = [_junk, _junk, _drop, _drop, _nudge, _nudge, _copy, _rename, _twice, _deep]
