"""How a pruned layer, or a stack of them, is stored: the sizes, and the tensors that follow from them."""

from __future__ import annotations

import reprlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from armorfact import Pattern

MAX_SIZE = 1 << 24  # of a dimension of a layer: far above every model, far below what overflows
INTEGER_DTYPES = {"int8": torch.int8}  # of kept values and wrappers, where that is not the dtype of all else


@dataclass(frozen=True)
class LayerFormat:
    """A pruned layer W (d_out, d_in) ~ A C B as it is stored.

    Args:
        name: of the module.
        shape: (d_out, d_in), that of W.
        pattern: N:M, that of C.
        block: sizes (b_out, b_in) of the blocks of A and B, or None for C alone.
        experts: how many such layers are stacked, one for each expert, the first dimension of every tensor; None for a
            layer of its own.
        core_dtype: of the kept values, "int8", whose scales are in A and B; None is that of the other tensors.
        wrapper_dtype: of the blocks of A and B, "int8" around a core of int8, with scales of their rows and columns;
            None is that of the other tensors.

    Raises:
        ValueError: a core in int8 without wrappers; wrappers in int8 around another core, or of experts; sizes that are
            no positive whole numbers, or that the pattern or the blocks do not divide.
    """

    name: str
    shape: tuple[int, int]
    pattern: Pattern
    block: tuple[int, int] | None
    experts: int | None = None
    core_dtype: str | None = None
    wrapper_dtype: str | None = None

    def __post_init__(self) -> None:
        self._check_dtypes()
        if self.experts is not None:
            _check_sizes(self.name, "experts", (self.experts,))
        _check_sizes(self.name, "shape [d_out, d_in]", self.shape)
        if self.shape[1] % self.pattern.group:
            raise ValueError(
                f"module {self.name}: expected d_in to be a multiple of {self.pattern.group} for pattern "
                f"{self.pattern}, got shape {list(self.shape)}"
            )
        if self.block is not None:
            _check_sizes(self.name, "block [b_out, b_in]", self.block)
            if self.shape[0] % self.block[0] or self.shape[1] % self.block[1]:
                raise ValueError(
                    f"module {self.name}: expected a block that divides shape {list(self.shape)}, "
                    f"got block {list(self.block)}"
                )

    def _check_dtypes(self) -> None:
        for key in ("core_dtype", "wrapper_dtype"):
            dtype = getattr(self, key)
            if dtype is not None and not (isinstance(dtype, str) and dtype in INTEGER_DTYPES):
                raise ValueError(
                    f"module {self.name}: expected a {key} of {', '.join(INTEGER_DTYPES)}, got {shown(dtype)}"
                )
        if self.core_dtype is not None and self.block is None:
            raise ValueError(f"module {self.name}: expected no core_dtype without blocks, got {self.core_dtype}")
        if self.wrapper_dtype is not None and (self.core_dtype is None or self.experts is not None):
            what = "around a core that has none" if self.core_dtype is None else "of experts"
            raise ValueError(f"module {self.name}: expected no wrapper_dtype {what}, got {self.wrapper_dtype}")

    @property
    def kept(self) -> int:
        """How many values a row of the core holds."""
        return self.shape[1] // self.pattern.group * self.pattern.keep

    @property
    def tensors(self) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor ``<name>.<part>`` by its part, the optional bias left out."""
        (d_out, d_in) = self.shape
        bytes_a_row = -(-self.kept * self.pattern.index_bits // 8)
        shapes: dict[str, tuple[int, ...]] = {"values": (d_out, self.kept), "positions": (d_out, bytes_a_row)}
        if self.block is not None:
            (b_out, b_in) = self.block
            shapes |= {"left": (d_out // b_out, b_out, b_out), "right": (d_in // b_in, b_in, b_in)}
        if self.wrapper_dtype is not None:
            shapes |= {"left_scales": (2, d_out), "right_scales": (2, d_in)}
        return {part: (*self._stacked, *shape) for part, shape in shapes.items()}

    @property
    def integers(self) -> dict[str, torch.dtype]:
        """The dtypes of those tensors that hold whole numbers, by their part; all others are floating."""
        found = {"positions": torch.uint8}
        if self.core_dtype is not None:
            found["values"] = INTEGER_DTYPES[self.core_dtype]
        if self.wrapper_dtype is not None:
            found["left"] = found["right"] = INTEGER_DTYPES[self.wrapper_dtype]
        return found

    @property
    def floating(self) -> str:
        """The part whose dtype all floating tensors share."""
        return next(part for part in ("values", "left", "left_scales") if part not in self.integers)

    @property
    def bias(self) -> tuple[int, ...]:
        """The shape of the bias, where there is one."""
        return (*self._stacked, self.shape[0])

    @property
    def _stacked(self) -> tuple[int, ...]:
        return () if self.experts is None else (self.experts,)

    @property
    def members(self) -> list[str]:
        """The names of the layers in it, as reports have them: its own, or one for each expert, as "experts.7.gate"."""
        owner, _, projection = self.name.rpartition(".")
        return [self.name] if self.experts is None else [f"{owner}.{e}.{projection}" for e in range(self.experts)]

    def nbytes(self, dtype: torch.dtype) -> int:
        """Bytes of all tensors but the bias, the floating ones in ``dtype``."""
        return sum(prod(shape) * self.integers.get(part, dtype).itemsize for part, shape in self.tensors.items())

    @classmethod
    def from_dict(cls, entry: Any, place: int, pattern: Pattern, optional: Collection[str] = ()) -> LayerFormat:
        """The layer that entry number ``place`` of ``modules`` describes.

        Args:
            optional: the keys beside name, shape and block that the version of the format knows.

        Raises:
            ValueError: a malformed entry; names it.
        """
        if not isinstance(entry, Mapping):
            raise ValueError(f"modules[{place}]: expected an object with name, shape and block, got {shown(entry)}")
        name = entry.get("name", f"modules[{place}]")
        if not isinstance(name, str) or not name:
            raise ValueError(f"modules[{place}]: expected the name of a module, got {shown(name)}")
        check_keys(f"module {name}", entry, ("name", "shape", "block"), optional)
        block, experts = entry["block"], entry.get("experts")
        shape = _pair(name, "shape [d_out, d_in]", entry["shape"])
        if "experts" in entry and type(experts) is not int:
            raise ValueError(f"module {name}: expected experts to be a whole number, got {shown(experts)}")
        for key in ("core_dtype", "wrapper_dtype"):
            if key in entry and entry[key] is None:
                raise ValueError(f"module {name}: expected {key} to be a name, got None")
        blocks = None if block is None else _pair(name, "block [b_out, b_in]", block)
        return cls(name, shape, pattern, blocks, experts, entry.get("core_dtype"), entry.get("wrapper_dtype"))

    def to_dict(self) -> dict[str, Any]:
        """The inverse of `from_dict`: plain JSON types."""
        block = None if self.block is None else list(self.block)
        found = {"name": self.name, "shape": list(self.shape), "block": block}
        more = {key: getattr(self, key) for key in ("experts", "core_dtype", "wrapper_dtype")}
        return found | {key: value for key, value in more.items() if value is not None}


def dtype_name(dtype: torch.dtype) -> str:
    """As files have it, such as "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def check_keys(what: str, found: Mapping[Any, Any], required: Collection[str], optional: Collection[str] = ()) -> None:
    if missing := [key for key in required if key not in found]:
        raise ValueError(f"{what}: expected the keys {', '.join(required)}, got none named {', '.join(missing)}")
    if unknown := [str(key) for key in found if key not in (*required, *optional)]:
        raise ValueError(f"{what}: expected only the keys {', '.join((*required, *optional))}, got {shown(unknown)}")


def _pair(name: str, key: str, sizes: Any) -> tuple[int, int]:
    if not isinstance(sizes, list | tuple) or len(sizes) != 2:
        raise ValueError(f"module {name}: expected {key} to be two whole numbers, got {shown(sizes)}")
    return sizes[0], sizes[1]


def _check_sizes(name: str, key: str, sizes: tuple[int, ...]) -> None:
    if any(type(size) is not int or not 1 <= size <= MAX_SIZE for size in sizes):
        raise ValueError(
            f"module {name}: expected {key} to be whole numbers from 1 to {MAX_SIZE}, got {shown(list(sizes))}"
        )


def shown(value: Any) -> str:
    """The value for an error message, cut short."""
    return reprlib.repr(value)
