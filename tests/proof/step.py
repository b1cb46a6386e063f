"""Gradients against the forward itself: a complex step, and central differences.

The derivative of L = Σ dy·y along d is Im L(x + i·h·d)/h without cancellation, so h may be 10⁻³⁰
and what is left is rounding. It needs a forward that is analytic, and no `abs` on its way.
Central differences need neither, and give half of the digits.
"""

from __future__ import annotations

import numpy as np

NOT_DIFFERENTIABLE = {
    ("ffn", "relu_at_zero"): "max(z, 0) has no derivative at 0",
    ("attention", "cosine_zero_vectors"): "0 has no direction",
    ("cross_entropy", "all_ignored_mean"): "a mean of nothing is NaN",
    ("linear_cross_entropy", "all_ignored_mean"): "a mean of nothing is NaN",
}
# where NumPy cannot carry the imaginary part; central differences go there
NOT_CARRIED = {
    ("ffn", "spread_by_10"): "exp(−2u) overflows, and a complex 1/∞ is NaN in NumPy",
    ("ffn", "outlier_row"): "exp(−2u) overflows, and a complex 1/∞ is NaN in NumPy",
}
_STEP = 1e-30


def smooth(op, case):
    return (op.name, case.name) not in NOT_DIFFERENTIABLE


def analytic(op, case):
    return smooth(op, case) and (op.name, case.name) not in NOT_CARRIED


def directions(point, rng):
    """{input: direction}; what holds no number stays what it is."""
    return {
        n: np.where(np.isfinite(x := point.inputs[n]), rng.standard_normal(x.shape), 0.0)
        for n in point.differentiable()
    }


def along(point, d):
    """(Σ dx·d, Σ |dx·d|) of the gradients."""
    terms = [
        (g * d[n])[np.isfinite(point.inputs[n])]
        for n, g in zip(point.differentiable(), point.gradients())
    ]
    return sum(t.sum() for t in terms), sum(np.abs(t).sum() for t in terms)


def complex_step(point, rng):
    """(|error|, scale): the gradients along a random direction against the complex step."""
    d = directions(point, rng)
    moved = {n: point.inputs[n] + 1j * _STEP * d[n] for n in d}
    ys = point.at(**moved)
    slope = sum((dy[_read(dy)] * y.imag[_read(dy)]).sum() for dy, y in zip(point.dys, ys))
    analytic, scale = along(point, d)
    return abs(slope / _STEP - analytic), scale


def _read(dy):
    """Where an output gradient counts: not in a row that sees nothing, whose own may be NaN."""
    return np.isfinite(dy) & (dy != 0)


def central(point, rng, step=1e-5):
    """(|error|, allowance, scale) of the gradients along a random direction."""
    d = directions(point, rng)

    def objective(t):
        ys = point.at(**{n: point.inputs[n] + t * d[n] for n in d})
        parts = [y[_read(dy)] * dy[_read(dy)] for y, dy in zip(ys, point.dys)]
        return sum(p.sum() for p in parts), sum(np.abs(p).sum() for p in parts)

    def slope(h):
        return (objective(h)[0] - objective(-h)[0]) / (2 * h)

    # a direction of size 1 must not leave the place where the inputs are
    typical = max(np.abs(point.inputs[n][d[n] != 0]).max(initial=0) for n in d)
    h = step * min(max(typical, 1e-2), 1.0)
    coarse, fine = slope(h), slope(h / 2)
    analytic, scale = along(point, d)
    # what is left of the h² term after halving h, and the rounding of the sums that h divides
    rounding = 64 * np.finfo(float).eps * (objective(0)[1] + scale) / h
    return abs(fine - analytic), 2 * abs(coarse - fine) + rounding, abs(analytic)
