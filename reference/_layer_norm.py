"""Layer normalisation over the last axis.

    x̂ = (x − μ)·r,   r = (σ² + ε)^(−1/2),   y = w ⊙ x̂ + b
    dx = r (g − mean(g) − x̂·mean(g ⊙ x̂)),   g = w ⊙ dy
    dw = Σ dy ⊙ x̂,   db = Σ dy

The variance is biased and taken in a second pass over values centred twice: subtracting the mean
of the centred values again removes what rounding left of a large offset.

Shapes: x, y (..., C); w, b (C,). dtype float64.
Source: Ba et al. 2016, arXiv:1607.06450; the corrected two-pass variance of Chan, Golub and
LeVeque 1983.
"""

import numpy as np

from ._checks import expect_shape
from ._rounding import floats, otherwise, refinement, sharper


def layer_norm(x, w, b, eps=1e-5):
    """y = w ⊙ (x − μ)/√(σ² + ε) + b  ->  y, cache."""
    x, w, b = floats(x, w, b)
    expect_shape("layer_norm", "w", w, "(C,)", x.shape[-1:])
    expect_shape("layer_norm", "b", b, "(C,)", x.shape[-1:])
    mean = x.mean(-1, keepdims=True)
    centred = x - mean
    centred -= refinement(centred.mean(-1, keepdims=True))
    rstd = 1 / np.sqrt(_mean_of_product(centred, centred) + eps)
    centred *= rstd
    xhat = otherwise(centred, lambda: x * rstd - mean * rstd)
    y = w * xhat
    y += b
    return y, (xhat, rstd, w, x, mean)


def layer_norm_backward(dy, cache):
    """-> dx, dw, db."""
    xhat, rstd, w, _, _ = cache
    dy = floats(dy)
    g = w * dy
    dx = g - g.mean(-1, keepdims=True)
    dx -= xhat * slope(g, cache)
    dx *= rstd
    return dx, *row_sums(dy, xhat)


def row_sums(dy, xhat):
    """-> dw, db."""
    rows = tuple(range(dy.ndim - 1))
    return (dy * xhat).sum(rows), dy.sum(rows)


def slope(g, cache):
    """mean(g ⊙ x̂)."""
    xhat, rstd, _, x, mean = cache

    def from_sums():
        return rstd * ((g * x).mean(-1, keepdims=True) - mean * g.mean(-1, keepdims=True))

    return otherwise(_mean_of_product(g, xhat), from_sums)


def _mean_of_product(a, b):
    """mean(a ⊙ b) of rows."""
    return sharper(
        a,
        lambda: np.einsum("...i,...i->...", a, b)[..., None] / a.shape[-1],
        lambda: (a * b).mean(-1, keepdims=True),
    )
