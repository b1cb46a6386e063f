"""What the pattern of an error says about its cause."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_TILES = (16, 32, 64, 128, 256)


@dataclass(frozen=True)
class Places:
    """Where the elements that are compared lie in a tensor of some shape.

    index: an array for each axis, which broadcast against each other.
    """

    shape: tuple
    index: tuple

    def at(self, element):
        """The place in the tensor of a compared element."""
        return tuple(int(np.broadcast_to(x, self.index[-1].shape)[element]) for x in self.index)

    def along(self, axis, bad):
        """The indices along an axis that are compared, and those with a failure."""
        coordinates = np.broadcast_to(self.index[axis], bad.shape)
        return np.unique(coordinates), np.unique(coordinates[bad])


def explain(got, want, bad, axes=(), places=None):
    """A hint in words: where the error is and what it looks like. "" where nothing stands out.

    got, want: the tensors; bad: mask of the elements past their budget (none for an RMS failure).
    axes: names of the tensor's axes. places: where the elements lie, if they are not all of them.
    """
    if not bad.any():
        return _about_values(got, want, np.isfinite(want))
    shape = places.shape if places else bad.shape
    axes = axes if len(axes) == len(shape) else [f"axis {a}" for a in range(len(shape))]
    hints = [_about_values(got, want, bad)]
    for axis, name in enumerate(axes):
        compared, wrong = places.along(axis, bad) if places else _along(axis, bad)
        hints.append(_about_axis(name, shape[axis], compared, wrong))
    return "; ".join(filter(None, hints))


def _along(axis, bad):
    hit = bad.any(tuple(a for a in range(bad.ndim) if a != axis))
    return np.arange(len(hit)), np.flatnonzero(hit)


def tile_of(bad):
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


def _about_axis(name, n, compared, wrong):
    """What sets the indices with failures apart from the others that are compared, of n."""
    if len(wrong) == len(compared):
        return ""
    if len(wrong) == 1:
        return f"only {name} {wrong[0]}" + (" (the last)" if wrong[0] == n - 1 else "")
    for t in reversed(_TILES):
        for side, rest in (("last", t - 1), ("first", 0)):
            if t < n and (wrong % t == rest).all():
                return f"only the {side} {name} of each tile of {t}"
    low, high = wrong[0], wrong[-1]
    between = compared[(compared >= low) & (compared <= high)]
    if len(between) == len(wrong):
        if high == compared[-1]:
            tails = [t for t in reversed(_TILES) if t < n and n % t and low == n - n % t]
            if tails:
                return f"only the tail of {name} past the last whole tile of {tails[0]}"
            return f"only {name} from {low} on"
        if low == compared[0]:
            return f"only {name} up to {high}"
        return f"only {name} {low} to {high}"
    steps = np.unique(np.diff(wrong))
    if len(steps) == 1 and len(wrong) > 2:
        return f"only every {steps[0]}th {name} from {low}"
    if len(compared) == n:
        return f"in {len(wrong)} of {n} {name}"
    return f"in {len(wrong)} of the {len(compared)} {name} compared"


def _whole_tiles(rows, t):
    """Whether the failing rows are whole tiles of t rows, and not all of them."""
    padded = np.zeros(-(-len(rows) // t) * t, bool)
    padded[: len(rows)] = rows
    tiles = padded.reshape(-1, t)
    whole = tiles[: len(rows) // t]
    return bool(len(whole) > 1 and (whole.all(1) | ~whole.any(1)).all() and not rows.all())
