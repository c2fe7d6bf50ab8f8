"""One-shot N:M pruning: where the factorization starts, and what it is compared with.

Each is a plain function ``method(weight, XXt, *, pattern)`` from a weight to a pruned weight of the
same shape, dtype and device; `METHODS` names them all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from armorfact.initial.magnitude import magnitude
from armorfact.initial.nowag import nowag
from armorfact.initial.sparsegpt import sparsegpt
from armorfact.initial.wanda import wanda

METHODS: dict[str, Callable[..., Any]] = {
    "sparsegpt": sparsegpt,
    "wanda": wanda,
    "nowag": nowag,
    "magnitude": magnitude,
}

__all__ = ["METHODS", "magnitude", "nowag", "sparsegpt", "wanda"]
