"""Affine map of the last axis.

    y = x w + b
    dx = dy wᵀ,   dw = xᵀ dy,   db = Σ dy

Shapes: x (..., K); w (K, N), as in OpenAI's released weights; b (N,) or None; y (..., N).
dtype float64.
Source: Radford et al. 2019, the released GPT-2 code (`conv1d` with kernel size 1).
"""

from ._checks import expect_rows, expect_shape
from ._rounding import floats


def linear(x, w, b=None):
    """y = x w + b  ->  y, cache."""
    x, w, b = floats(x, w, b)
    expect_rows("linear", "x", x, "(..., K)")
    expect_shape("linear", "w", w, "(K, N)", (x.shape[-1], None))
    if b is not None:
        expect_shape("linear", "b", b, "(N,)", (w.shape[1],))
    y = x @ w
    if b is not None:
        y += b
    return y, (x, w, b is not None)


def linear_backward(dy, cache):
    """-> dx, dw, db (None where b was absent)."""
    x, w, has_b = cache
    dy = floats(dy)
    rows = dy.reshape(-1, dy.shape[-1])
    dx = dy @ w.T
    dw = x.reshape(-1, x.shape[-1]).T @ rows
    return dx, dw, rows.sum(0) if has_b else None
