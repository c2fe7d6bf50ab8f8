"""Compiled CPU kernels (numba), cached on disk, parallel over independent blocks."""

from __future__ import annotations

import functools
import itertools
import os
from concurrent.futures import ThreadPoolExecutor

import numba
import numpy as np

# Entries below which handing work to another thread costs more than it saves.
WORTH_A_THREAD = 1 << 14


@numba.njit(cache=True, inline="always")
def _best_support(numerator, inverses, supports, best_values):
    """The support with the largest gain ``h_m' S_mm^-1 h_m``; its values go to ``best_values``."""
    keep = supports.shape[1]
    best_gain = -1.0
    best = 0
    for m in range(supports.shape[0]):
        gain = 0.0
        for a in range(keep):
            product = 0.0
            for b in range(keep):
                product += inverses[m, a, b] * numerator[supports[m, b]]
            gain += product * numerator[supports[m, a]]
        if gain > best_gain:
            best_gain, best = gain, m
    best_values[:] = 0.0
    for a in range(keep):
        for b in range(keep):
            best_values[supports[best, a]] += inverses[best, a, b] * numerator[supports[best, b]]
    return best_gain


@numba.njit(cache=True, inline="always")
def _best_pair_of_four(numerator, inverses, supports, best_values):
    """`_best_support` for 2:4, unrolled: three multiply-adds a support."""
    best_gain = -1.0
    best = 0
    for m in range(6):
        x, y = numerator[supports[m, 0]], numerator[supports[m, 1]]
        gain = x * (inverses[m, 0, 0] * x + 2.0 * inverses[m, 0, 1] * y) + inverses[m, 1, 1] * y * y
        if gain > best_gain:
            best_gain, best = gain, m
    x, y = numerator[supports[best, 0]], numerator[supports[best, 1]]
    best_values[:] = 0.0
    best_values[supports[best, 0]] = inverses[best, 0, 0] * x + inverses[best, 0, 1] * y
    best_values[supports[best, 1]] = inverses[best, 1, 0] * x + inverses[best, 1, 1] * y
    return best_gain


@numba.njit(cache=True)
def _sweep_block(gradient, core, visit, left_gram, right_gram, inverses, supports):
    """One Gauss-Seidel pass over the groups of one block; returns how much the loss fell.

    ``gradient`` (rows, columns), the slice of T C S - P, and ``core`` are updated in place.
    """
    rows, columns = core.shape
    groups, group = visit.shape[1], columns // visit.shape[1]
    two_of_four = group == 4 and supports.shape[1] == 2
    carried = np.zeros(columns, dtype=core.dtype)
    numerator = np.empty(group, dtype=np.float64)
    values = np.empty(group, dtype=np.float64)
    fallen = 0.0
    for r in range(rows):
        t = np.float64(left_gram[r, r])
        if t <= 0.0:
            continue
        carried[:] = 0
        moved = False
        for g in range(groups):
            if not visit[r, g]:
                continue
            lo = g * group
            before = 0.0
            for a in range(group):
                quadratic = 0.0
                for b in range(group):
                    quadratic += np.float64(right_gram[lo + a, lo + b]) * core[r, lo + b]
                slope = np.float64(gradient[r, lo + a]) + t * carried[lo + a]
                numerator[a] = t * quadratic - slope
                before += (numerator[a] - slope) * core[r, lo + a]
            if two_of_four:
                gain = _best_pair_of_four(numerator, inverses[g], supports, values) / t
            else:
                gain = _best_support(numerator, inverses[g], supports, values) / t
            if gain <= before:
                continue
            fallen += gain - before
            moved = True
            for a in range(group):
                new = core.dtype.type(values[a] / t)
                change = new - core[r, lo + a]
                core[r, lo + a] = new
                if change != 0:
                    for c in range(columns):
                        carried[c] += change * right_gram[lo + a, c]
        if moved:
            for other in range(r, rows):
                weight = left_gram[other, r]
                for c in range(columns):
                    gradient[other, c] += weight * carried[c]
    return fallen


@numba.njit(cache=True, nogil=True)
def _sweep_range(gradient, core, visit, left_gram, right_gram, inverses, supports, fallen, start, stop):
    columns = core.shape[1]
    for block in range(start, stop):
        i, j = block // columns, block % columns
        fallen[i, j] = _sweep_block(
            gradient[i, j], core[i, j], visit[i, j], left_gram[i], right_gram[j], inverses[j], supports
        )


def sweep_blocks(gradient, core, visit, left_gram, right_gram, inverses, supports):
    """`_sweep_block` over all (i, j) blocks; they must not interact, so any split gives the same bits.

    Threads of Python's own pool, which sleep between calls: a numba thread pool spins, and takes
    the cores from the matrix products that come in between.

    Args:
        gradient, core: (I, J, rows, columns) float32 or float64, updated in place.
        visit: (I, J, rows, groups) bool, the groups to update.
        left_gram: (I, rows, rows); right_gram: (J, columns, columns).
        inverses: (J, groups, supports, keep, keep) float64, see `armorfact.steps.core`.
        supports: (supports, keep) integer positions in a group.

    Returns:
        (I, J) float64: how much each block lowered the loss.
    """
    fallen = np.zeros(core.shape[:2], dtype=np.float64)
    arguments = (gradient, core, visit, left_gram, right_gram, inverses, supports, fallen)
    parts = min(_threads(), fallen.size) if core.size >= WORTH_A_THREAD else 1
    cuts = [fallen.size * k // parts for k in range(parts + 1)]
    ranges = list(itertools.pairwise(cuts))
    others = [_pool().submit(_sweep_range, *arguments, *part) for part in ranges[1:]]
    _sweep_range(*arguments, *ranges[0])
    for other in others:
        other.result()
    return fallen


@functools.cache
def _threads() -> int:
    # Not numba.get_num_threads(): that starts numba's own pool, and its OpenMP ends a forked child.
    return int(numba.config.NUMBA_NUM_THREADS)  # type: ignore[attr-defined]


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max_workers=_threads(), thread_name_prefix="armorfact")


# A forked child inherits the pool but not its threads. Windows has no fork.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)
