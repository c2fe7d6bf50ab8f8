"""The core sweep as batched array operations, for devices without a compiled kernel."""

from __future__ import annotations

from typing import Any

from armorfact import arrays

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
    """`armorfact.arrays.kernels.sweep_blocks` on any device: same order, same arguments.

    One row and one group of every (i, j) block move at a time; what the row carries to the rows
    after it is applied to the whole block as one outer product.
    """
    xp = arrays.namespace(core)
    rows, groups = visit.shape[2], visit.shape[3]
    group = core.shape[3] // groups
    place = _placement(supports, group, inverses)
    fallen = xp.zeros(core.shape[:2], dtype=xp.float64, device=arrays.device(core))
    for r in range(rows):
        t = left_gram[:, r, r][:, None, None]
        carried = xp.zeros_like(core[:, :, r, :])
        for g in range(groups):
            columns = slice(g * group, (g + 1) * group)
            old = core[:, :, r, columns]
            slope = gradient[:, :, r, columns] + t * carried[:, :, columns]
            stripe = right_gram[:, columns, :]
            new, gain = _best_groups(
                arrays.float64(old),
                arrays.float64(slope),
                arrays.float64(t),
                arrays.float64(stripe[:, :, columns]),
                inverses[:, g, ...],
                place,
            )
            accepted = (gain > 0) & visit[:, :, r, g]
            fallen += xp.where(accepted, gain, xp.zeros_like(gain))
            new = xp.where(accepted[..., None], xp.astype(new, core.dtype), old)
            carried += (_row(new - old) @ stripe[None, ...])[..., 0, :]
            core[:, :, r, columns] = new
        weights = left_gram[:, r:, r][:, None, :, None]
        gradient[:, :, r:, :] += weights * carried[:, :, None, :]
    return fallen


def sweep_integers(
    gradient: Array, core: Array, kept: Array, left_gram: Array, right_gram: Array, largest: int
) -> None:
    """`armorfact.arrays.kernels.sweep_integers` on any device: an entry of every block at a time, in the same order."""
    xp = arrays.namespace(core)
    for r in range(core.shape[1]):
        t = left_gram[:, r, r]
        carried = xp.zeros_like(core[:, r, :])
        for k in range(core.shape[2]):
            old, curvature = core[:, r, k], t * right_gram[k, k]
            usable = kept[:, r, k] & (curvature > 0)
            slope = gradient[:, r, k] + t * carried[:, k]
            wanted = old - slope / xp.where(usable, curvature, xp.ones_like(curvature))
            new = xp.where(usable, xp.clip(xp.round(wanted), -largest, largest), old)
            carried += (new - old)[:, None] * right_gram[k, :]
            core[:, r, k] = new
        gradient[:, r:, :] += left_gram[:, r:, r][:, :, None] * carried[:, None, :]


def _placement(supports: Array, group: int, like: Array) -> Array:
    """One-hot (supports, keep, group): puts the values of a support at their positions."""
    xp = arrays.namespace(like)
    positions = xp.arange(group, dtype=supports.dtype, device=arrays.device(like))
    return xp.astype(supports[..., None] == positions, like.dtype)


def _row(vector: Array) -> Array:
    return vector[..., None, :]


def _best_groups(old: Array, slope: Array, t: Array, gram: Array, inverses: Array, place: Array) -> tuple[Array, Array]:
    """The best values of one group of every block, and how much they lower the loss.

    Args:
        old, slope: (I, J, group) float64; t: (I, 1, 1); gram: (J, group, group).
        inverses: (J, supports, keep, keep); place: (supports, keep, group).
    """
    xp = arrays.namespace(old)
    numerator = t * (_row(old) @ gram)[..., 0, :] - slope
    before = xp.sum((numerator - slope) * old, axis=-1)
    # (I, J, supports, keep): the numerator at the positions of each support.
    picked = xp.sum(place * numerator[:, :, None, None, :], axis=-1)
    solved = xp.sum(inverses * picked[..., None, :], axis=-1)
    gains = xp.sum(solved * picked, axis=-1)
    best = xp.argmax(gains, axis=-1, keepdims=True)
    chosen = xp.arange(gains.shape[-1], dtype=best.dtype, device=arrays.device(old)) == best
    values = xp.sum(place * solved[..., None], axis=-2)
    safe = xp.where(t > 0, t, xp.ones_like(t))
    new = xp.sum(xp.where(chosen[..., None], values, xp.zeros_like(values)), axis=-2) / safe
    gain = xp.max(gains, axis=-1) / safe[..., 0] - before
    return new, xp.where(t[..., 0] > 0, gain, xp.zeros_like(gain))
