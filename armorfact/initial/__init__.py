"""One-shot N:M pruning: where the factorization starts, and what it is compared with.

Each is a plain function ``method(weight, XXt, *, pattern)`` from a weight to a pruned weight of the
same shape, dtype and device; `METHODS` has what each does with checked arguments.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from armorfact.initial.magnitude import magnitude
from armorfact.initial.magnitude import prune as by_magnitude
from armorfact.initial.nowag import nowag
from armorfact.initial.nowag import prune as by_nowag
from armorfact.initial.sparsegpt import prune as by_sparsegpt
from armorfact.initial.sparsegpt import sparsegpt
from armorfact.initial.wanda import prune as by_wanda
from armorfact.initial.wanda import wanda

# On arguments that were checked, in one working dtype: ``prune(weight, gram, pattern)``.
METHODS: dict[str, Callable[..., Any]] = {
    "sparsegpt": by_sparsegpt,
    "wanda": by_wanda,
    "nowag": by_nowag,
    "magnitude": by_magnitude,
}

__all__ = ["METHODS", "magnitude", "nowag", "sparsegpt", "wanda"]
