"""The initialization, the solver, and what else is chosen."""

from __future__ import annotations

from typing import Any

from armorfact import arrays
from armorfact.pattern import Pattern
from armorfact.result import Result
from armorfact.validate.weights import same_home

Array = Any


def one_of(name: str, value: Any, known: tuple[Any, ...]) -> None:
    """That an argument has one of the values it may have.

    Raises:
        ValueError: another one.
    """
    if value not in known:
        raise ValueError(f"{name} must be one of {known}, got {value!r}")


def seed(value: Any) -> int:
    """The seed of the solvers that draw at random.

    Raises:
        TypeError: not an integer. ValueError: a negative one.
    """
    found = arrays.integer(value, "seed")
    if found < 0:
        raise ValueError(f"seed must not be negative, got {found}")
    return found


def solver(value: Any, known: tuple[str, ...]) -> None:
    """That the solver is one of those known, or has what a solver needs.

    Raises:
        ValueError: an unknown name. TypeError: an object without the methods, or a class.
    """
    if isinstance(value, str):
        one_of("solver", value, known)
        return
    missing = [name for name in ("init", "step", "max_sweeps", "rtol", "patience") if not hasattr(value, name)]
    if missing or isinstance(value, type):
        raise TypeError(
            f"solver must be one of {known} or an object of the solver protocol; "
            f"{value!r} lacks {missing or 'an instance: call the class'}"
        )


def callback(value: Any) -> None:
    """That the callback can be called, or is None.

    Raises:
        TypeError: it is something else.
    """
    if value is not None and not callable(value):
        raise TypeError(f"callback must be a function of a Progress, got {value!r}")


def init(value: Any, weight: Array, pattern: Pattern, block: tuple[int, int], known: tuple[str, ...]) -> None:
    """That the initialization is a known name, a mask, or a `Result` that fits W.

    Raises:
        TypeError: none of these, or of another library than W.
        ValueError: an unknown name; another shape, pattern, blocks or device; a mask with too many
            entries; factors that the dtype of W cannot hold.
    """
    if isinstance(value, str):
        one_of("init", value, known)
    elif isinstance(value, Result):
        _warm_start(value, weight, pattern, block)
    elif arrays.is_array(value):
        _mask(value, weight, pattern)
    else:
        raise TypeError(f"init must be one of {known}, a boolean mask or a Result, got {type(value).__name__}")


def _warm_start(value: Result, weight: Array, pattern: Pattern, block: tuple[int, int]) -> None:
    found = (value.core.shape, value.core.pattern, value.left.blocks.shape[-1], value.right.blocks.shape[-1])
    if found != (tuple(weight.shape), pattern, *block):
        raise ValueError(
            f"a warm start needs the same shape, pattern and blocks: expected "
            f"{tuple(weight.shape)}, {pattern}, {block}, got {found[0]}, {found[1]}, {found[2:]}"
        )
    same_home(value.core.values, weight, "the warm start")
    if not value.factors.astype(weight.dtype).finite():
        raise ValueError(f"the warm start does not fit into {weight.dtype}; convert W to float32")


def _mask(mask: Array, weight: Array, pattern: Pattern) -> None:
    same_home(mask, weight, "the mask")
    if mask.dtype != arrays.namespace(mask).bool:
        raise TypeError(f"a mask must be boolean, got dtype {mask.dtype}; compare with `!= 0`")
    if tuple(mask.shape) != tuple(weight.shape):
        raise ValueError(f"the mask must have the shape of W, {tuple(weight.shape)}, got {tuple(mask.shape)}")
    if pattern.most_kept(mask) > pattern.keep:
        raise ValueError(
            f"the mask keeps {pattern.most_kept(mask)} of a group of {pattern.group}; "
            f"pattern {pattern} allows {pattern.keep}"
        )
