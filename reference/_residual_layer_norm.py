"""Residual addition, then layer normalisation of the sum.

    h = x + r,   y = w ⊙ (h − μ)/√(σ² + ε) + b
    dx = dr = dh + r (g − mean(g) − ĥ·mean(g ⊙ ĥ)),   g = w ⊙ dy
    dw = Σ dy ⊙ ĥ,   db = Σ dy

with ĥ the normalised h and r its inverse deviation, as in `layer_norm`. y comes from the unrounded
h: a kernel that rounds h to the storage dtype before it normalises loses the digits of a residual
stream that is far from 0. Its backward may read the h that it wrote.

Shapes: x, r, y, h (..., C); w, b (C,). dtype float64.
Source: Vaswani et al. 2017, section 5.4 (add and norm); Ba et al. 2016, arXiv:1607.06450.
"""

import numpy as np

from ._checks import expect_shape
from ._layer_norm import layer_norm, row_sums, slope
from ._rounding import floats, rescaled, sharper, stored


def residual_layer_norm(x, r, w, b, eps=1e-5):
    """h = x + r,  y = w ⊙ (h − μ)/√(σ² + ε) + b  ->  (y, h), cache."""
    x, r, w, b = floats(x, r, w, b)
    expect_shape("residual_layer_norm", "r", r, "(..., C)", x.shape)
    expect_shape("residual_layer_norm", "w", w, "(C,)", x.shape[-1:])
    expect_shape("residual_layer_norm", "b", b, "(C,)", x.shape[-1:])
    h = x + r
    y, (hhat, rstd, w, h, mean) = layer_norm(h, w, b, eps)
    # a backward that reads the h which was written sees it rounded
    hhat = sharper(h, lambda: hhat, lambda: hhat + (stored(h) - h) * rstd)
    return (y, h), (hhat, rstd, w, h, mean)


def residual_layer_norm_backward(dy, cache):
    """-> dx, dr, dw, db. dy is (dy, dh)."""
    hhat, rstd, w, _, _ = cache
    dy, dh = floats(*dy)
    g = w * dy
    others = hhat * slope(g, cache)
    others += g.mean(-1, keepdims=True)

    def exact():
        dx = np.subtract(g, others, out=g)
        dx *= rstd
        dx += dh
        return dx

    # dh may join any term: where they cancel, as in a single column, the rounding of this one stays
    dx = sharper(g, exact, lambda: (dh + rescaled(rstd * g)) - rstd * others)
    return dx, dx, *row_sums(dy, hhat)
