"""Dataclasses written as JSON, and read back by their annotations: whatever does not fit is named with its place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import cache
from typing import Any, get_args, get_origin, get_type_hints

from armorfact_hf.layers.format import shown

_PLAIN = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "null"}


def to_json(value: Any) -> Any:
    """Plain JSON types; a dataclass becomes an object of its fields, in their order."""
    if is_dataclass(value):
        return {_key(field): to_json(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {key: to_json(item) for key, item in value.items()}
    return [to_json(item) for item in value] if isinstance(value, tuple | list) else value


def from_json(kind: Any, found: Any, place: str = "") -> Any:
    """What parsed JSON stands for, read strictly.

    Args:
        kind: the type it has to have: a dataclass; int, float, str, bool or None; object, which is anything; or
            tuple[X, ...], tuple[X, Y], Mapping[str, X] and unions (of plain types and at most one other) of those. A
            field with a default may be missing, and one with metadata {"json": name} goes by that name.
        found: the parsed JSON.
        place: where it stands, for errors.

    Raises:
        ValueError: a missing or unknown key, or a value of another type, at any depth: such as "layers[3].losses.wanda:
            expected a number, got 'x'".
    """
    if is_dataclass(kind):
        return _record(kind, found, place)
    if kind is object:
        return found
    origin, parts = get_origin(kind), get_args(kind)
    if origin is tuple:
        return _sequence(parts, found, place)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        items = _object(found, place).items()
        return {key: from_json(parts[1], item, _inside(place, key)) for key, item in items}
    return _one_of(parts or (kind,), found, place)


def _record(kind: Any, found: Any, place: str) -> Any:
    known = {_key(field): field for field in fields(kind)}
    given = _object(found, place)
    missing = [key for key, field in known.items() if key not in given and _required(field)]
    if unknown := [key for key in given if key not in known]:
        raise ValueError(f"{_inside(place, unknown[0])}: expected only the keys {', '.join(known)}, got this one")
    if missing:
        raise ValueError(f"{_inside(place, missing[0])}: expected this key, got only {', '.join(given) or 'none'}")
    types = _types(kind)
    values = {
        known[key].name: from_json(types[known[key].name], item, _inside(place, key)) for key, item in given.items()
    }
    try:
        return kind(**values)
    except (TypeError, ValueError) as error:  # what the dataclass itself checks
        raise ValueError(f"{place}: {error}" if place else str(error)) from error


def _sequence(parts: tuple[Any, ...], found: Any, place: str) -> tuple[Any, ...]:
    several = len(parts) == 2 and parts[1] is ...
    if not isinstance(found, list) or not (several or len(found) == len(parts)):
        raise ValueError(f"{place}: expected a list{'' if several else f' of {len(parts)}'}, got {shown(found)}")
    kinds = [parts[0]] * len(found) if several else parts
    return tuple(
        from_json(kind, item, f"{place}[{index}]") for index, (kind, item) in enumerate(zip(kinds, found, strict=True))
    )


def _one_of(kinds: tuple[Any, ...], found: Any, place: str) -> Any:
    plain = [kind for kind in kinds if kind in _PLAIN]
    if any(_is(kind, found) for kind in plain):
        return found
    for other in kinds:
        if other not in _PLAIN:
            return from_json(other, found, place)
    raise ValueError(f"{place}: expected {' or '.join(_PLAIN[kind] for kind in plain)}, got {shown(found)}")


def _is(kind: type, found: Any) -> bool:
    return type(found) is kind or (kind is float and type(found) is int)  # True is no number


def _object(found: Any, place: str) -> Mapping[str, Any]:
    if not isinstance(found, Mapping):
        raise ValueError(f"{place}: expected an object, got {shown(found)}".removeprefix(": "))
    return found


def _inside(place: str, key: str) -> str:
    return f"{place}.{key}" if place else key


def _key(field: Field[Any]) -> str:
    return field.metadata.get("json", field.name)


def _required(field: Field[Any]) -> bool:
    return field.default is MISSING and field.default_factory is MISSING


_types = cache(get_type_hints)
