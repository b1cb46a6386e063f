"""What the pattern of an error says about its cause."""

from __future__ import annotations

import numpy as np

_TILES = (16, 32, 64, 128, 256)


def explain(got, want, bad, axes=()):
    """A hint in words: where the error is and what it looks like. "" where nothing stands out.

    got, want: the tensors; bad: mask of the elements past their budget (none for an RMS failure).
    axes: names of the tensor's axes.
    """
    if not bad.any():
        return _about_values(got, want, np.isfinite(want))
    axes = list(axes) if len(axes) == want.ndim else [f"axis {a}" for a in range(want.ndim)]
    return "; ".join(filter(None, (_about_values(got, want, bad), *_about_places(bad, axes))))


def tile_of(bad, axes=()):
    """The largest usual tile size that the failing rows line up with, or None."""
    if bad.ndim < 2 or not bad.any():
        return None
    rows = bad.any(tuple(a for a in range(bad.ndim) if a != bad.ndim - 2))
    return next((t for t in reversed(_TILES) if t < len(rows) and _whole_tiles(rows, t)), None)


def _about_values(got, want, bad):
    got, want = got[bad], want[bad]
    finite = np.isfinite(got) & np.isfinite(want)
    if np.isnan(got).all():
        return "all NaN there"
    if not finite.any():
        return ""
    if not finite.all():
        return f"{int((~finite).sum())} of {finite.size} values there are not finite"
    if not got.any():
        return "all zero there"
    if not want.any():
        return "must be zero there"
    if finite.size > 1 and np.ptp(got) == 0:
        return f"constant {got[0]:.6g} there"
    large = np.abs(want) > 1e-3 * np.abs(want).max()
    ratio = got[large] / want[large]
    factor = np.median(ratio)
    spread = np.abs(ratio - factor).max() if ratio.size > 2 else np.inf
    off = abs(factor - 1)
    # a factor that holds much more closely than it differs from 1
    if off and spread < 0.2 * off:
        return "the sign is wrong" if abs(factor + 1) < 1e-3 else f"constant factor {factor:.6g}"
    shift = got - want
    if shift.size > 2 and np.ptp(shift) < 0.02 * np.abs(shift).max():
        return f"constant offset {np.median(shift):.4g}"
    return ""


def _about_places(bad, axes):
    """One hint for each axis along which the failures are not everywhere."""
    for axis, name in enumerate(axes):
        others = tuple(a for a in range(bad.ndim) if a != axis)
        hit = bad.any(others)
        n, count = len(hit), int(hit.sum())
        if n == 1 or count == n:
            continue
        where = np.flatnonzero(hit)
        yield _about_axis(hit, where, name, n)


def _about_axis(hit, where, name, n):
    for t in reversed(_TILES):
        if t >= n:
            continue
        if len(where) > 1 and (where % t == t - 1).all():
            return f"only the last {name} of each tile of {t}"
        if len(where) > 1 and (where % t == 0).all():
            return f"only the first {name} of each tile of {t}"
    tail = next((t for t in reversed(_TILES) if n % t and where[0] == n - n % t and n > t), None)
    if tail and hit[where[0] :].all():
        return f"only the tail of {name} past the last whole tile of {tail}"
    if len(where) == 1:
        last = " (the last)" if where[0] == n - 1 else ""
        return f"only {name} {where[0]}{last}"
    if hit[where[0] :].all() and where[0] > 0:
        return f"only {name} from {where[0]} on"
    if hit[: where[-1] + 1].all():
        return f"only {name} up to {where[-1]}"
    if (np.diff(where) == 1).all():
        return f"only {name} {where[0]} to {where[-1]}"
    steps = np.unique(np.diff(where))
    if len(steps) == 1 and len(where) > 2:
        return f"only every {steps[0]}th {name} from {where[0]}"
    return f"in {len(where)} of {n} {name}"


def _whole_tiles(rows, t):
    """Whether the failing rows are whole tiles of t rows, and not all of them."""
    padded = np.zeros(-(-len(rows) // t) * t, bool)
    padded[: len(rows)] = rows
    tiles = padded.reshape(-1, t)
    whole = tiles[: len(rows) // t]
    return bool(len(whole) > 1 and (whole.all(1) | ~whole.any(1)).all() and not rows.all())
