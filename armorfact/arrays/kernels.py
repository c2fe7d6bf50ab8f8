"""Compiled CPU kernels (numba), cached on disk, parallel over independent blocks."""

from __future__ import annotations

import functools
import itertools
import os
from concurrent.futures import ThreadPoolExecutor

import numba
import numpy as np

from armorfact.arrays.compiled import compiled

# Entries below which handing work to another thread costs more than it saves.
WORTH_A_THREAD = 1 << 14


@compiled(inline="always")
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


@compiled(inline="always")
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


@compiled()
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


@compiled(nogil=True)
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
    _side_by_side(_sweep_range, fallen.size, core.size, arguments)
    return fallen


@compiled(nogil=True)
def _sweep_integers_range(gradient, core, kept, left_gram, right_gram, largest, start, stop):
    _, rows, columns = core.shape
    carried = np.empty(columns, dtype=core.dtype)
    for i in range(start, stop):
        for r in range(rows):
            t = left_gram[i, r, r]
            carried[:] = 0
            moved = False
            for k in range(columns):
                curvature = t * right_gram[k, k]
                if not kept[i, r, k] or not curvature > 0:
                    continue
                wanted = core[i, r, k] - (gradient[i, r, k] + t * carried[k]) / curvature
                new = core.dtype.type(min(max(np.rint(wanted), -largest), largest))
                change = new - core[i, r, k]
                if change != 0:
                    moved = True
                    core[i, r, k] = new
                    for c in range(columns):
                        carried[c] += change * right_gram[k, c]
            if moved:
                for other in range(r, rows):
                    weight = left_gram[i, other, r]
                    for c in range(columns):
                        gradient[i, other, c] += weight * carried[c]


def sweep_integers(gradient, core, kept, left_gram, right_gram, largest):
    """Move every kept entry of C to the best whole number in its turn; rows of different blocks do not interact.

    The entry (r, k) moves by the nearest whole number to ``-q / (T_rr S_kk)``, so that no move raises the loss.

    Args:
        gradient: (I, rows, columns), the slice q of T C S - P. core: the same shape, whole numbers in a floating dtype.
            Both are updated in place.
        kept: (I, rows, columns) bool, the entries that may move.
        left_gram: T, (I, rows, rows). right_gram: S, (columns, columns).
        largest: magnitude that an entry may have.
    """
    _side_by_side(_sweep_integers_range, len(core), core.size, (gradient, core, kept, left_gram, right_gram, largest))


def _side_by_side(sweep, blocks, size, arguments):
    """``sweep(*arguments, start, stop)`` over ranges of blocks, one for each thread; ``size`` entries in all."""
    parts = min(_threads(), blocks) if size >= WORTH_A_THREAD else 1
    ranges = list(itertools.pairwise(blocks * k // parts for k in range(parts + 1)))
    others = [_pool().submit(sweep, *arguments, *part) for part in ranges[1:]]
    sweep(*arguments, *ranges[0])
    for other in others:
        other.result()


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
