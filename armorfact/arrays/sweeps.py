"""The core sweeps, compiled on the CPU and batched elsewhere."""

from __future__ import annotations

from typing import Any

from armorfact import arrays
from armorfact.arrays import batched

Array = Any


def sweep_blocks(
    gradient: Array,
    core: Array,
    visit: Array,
    left_gram: Array,
    right_gram: Array,
    inverses: Array,
    supports: Array,
) -> Array:
    """One pass over the groups of independent blocks, on the device the arrays are on.

    Compiled on the CPU (`kernels.sweep_blocks`, where the arguments are described), batched array
    operations elsewhere (`batched.sweep_blocks`). ``gradient`` and ``core`` are updated in place.
    """
    arguments = (gradient, core, visit, left_gram, right_gram, inverses, supports)
    if not arrays.shares_memory_with_numpy(core):
        return batched.sweep_blocks(*arguments)
    from armorfact.arrays import kernels

    fallen = kernels.sweep_blocks(*(arrays.as_numpy(argument) for argument in arguments))
    return arrays.namespace(core).asarray(fallen, device=arrays.device(core))


def sweep_integers(
    gradient: Array, core: Array, kept: Array, left_gram: Array, right_gram: Array, largest: int
) -> None:
    """One pass over the entries of a core of whole numbers, on the device the arrays are on; see `sweep_blocks`."""
    if not arrays.shares_memory_with_numpy(core):
        batched.sweep_integers(gradient, core, kept, left_gram, right_gram, largest)
        return
    from armorfact.arrays import kernels

    q, c, kept, t, s = map(arrays.as_numpy, (gradient, core, kept, left_gram, right_gram))
    kernels.sweep_integers(q, c, kept, t, s, largest)
