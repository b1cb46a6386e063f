"""Position-wise feed-forward network.

    z = x w1 + b1,   a = f(z),   y = a w2 + b2 (+ residual)
    da = dy w2ᵀ,   dz = da ⊙ f'(z),   dx = dz w1ᵀ,   dresidual = dy
    dw1 = xᵀ dz,   db1 = Σ dz,   dw2 = aᵀ dy,   db2 = Σ dy

    gelu:       f(z) = z·Φ(z)
    gelu_tanh:  f(z) = z/2·(1 + tanh(√(2/π)·(z + 0.044715 z³)))
    relu:       f(z) = max(z, 0), with gradient 0 at 0

Shapes: x, y (..., C); w1 (C, F); b1 (F,); w2 (F, C); b2 (C,); residual like x. dtype float64.
Source: Vaswani et al. 2017, section 3.3; Hendrycks and Gimpel 2016, arXiv:1606.08415.
"""

import math

import numpy as np
from scipy.special import erf, erfc

from ._checks import expect_choice, expect_rows, expect_shape
from ._rounding import Rounded, floats, sharper, stored

ACTIVATIONS = ("gelu_tanh", "gelu", "relu")
# elements of 256 KiB
_PIECE = 1 << 15


def ffn(x, w1, b1, w2, b2, activation="gelu_tanh", *, residual=None):
    """y = f(x w1 + b1) w2 + b2 (+ residual)  ->  y, cache."""
    x, w1, b1, w2, b2, residual = floats(x, w1, b1, w2, b2, residual)
    expect_choice("ffn", "activation", activation, ACTIVATIONS)
    expect_rows("ffn", "x", x, "(..., C)")
    expect_shape("ffn", "w1", w1, "(C, F)", (x.shape[-1], None))
    C, F = w1.shape
    expect_shape("ffn", "b1", b1, "(F,)", (F,))
    expect_shape("ffn", "w2", w2, "(F, C)", (F, C))
    expect_shape("ffn", "b2", b2, "(C,)", (C,))
    z, a = hidden(x, w1, b1, activation)
    y = a @ w2
    y += b2
    if residual is not None:
        expect_shape("ffn", "residual", residual, "x's shape", x.shape)
        y = stored(y)
        y += residual
    return y, (x, w1, w2, z, a, activation, residual is not None)


def hidden(x, w1, b1, activation):
    """z = x w1 + b1,  a = f(z)."""
    z = x @ w1
    z += b1
    z = stored(z)
    return z, stored(_by_pieces(lambda z: _activate(z, activation), z))


def ffn_backward(dy, cache):
    """-> dx, dw1, db1, dw2, db2, and dresidual where residual was given."""
    x, w1, w2, z, a, activation, added = cache
    dy = floats(dy)
    dz = hidden_gradient(dy, w2, z, activation)
    dx, dresidual = dz @ w1.T, (dy,) if added else ()
    x, dz, a, dy = (t.reshape(-1, t.shape[-1]) for t in (x, dz, a, dy))
    return dx, x.T @ dz, dz.sum(0), a.T @ dy, dy.sum(0), *dresidual


def hidden_gradient(dy, w2, z, activation):
    """dz = (dy w2ᵀ) ⊙ f'(z)."""
    da = stored(dy @ w2.T)
    return stored(_by_pieces(lambda da, z: da * _slope(z, activation), da, z))


def _by_pieces(formula, *arrays):
    """An elementwise formula of arrays of one shape; what it makes on the way stays in cache."""
    if isinstance(arrays[0], Rounded):
        return formula(*arrays)
    out, flat = np.empty(arrays[0].shape, arrays[0].dtype), [x.reshape(-1) for x in arrays]
    for start in range(0, out.size, _PIECE):
        piece = slice(start, start + _PIECE)
        out.reshape(-1)[piece] = formula(*(x[piece] for x in flat))
    return out


def _activate(z, activation):
    if activation == "relu":
        return np.maximum(z, 0)
    if activation == "gelu":
        return z * _normal_cdf(z)
    gate, _ = _gate(_inner(z))
    gate *= z
    return gate


def _slope(z, activation):
    """f'(z)."""
    if activation == "relu":
        return np.where(z > 0, 1.0, 0.0)
    if activation == "gelu":
        density = np.exp(-0.5 * z * z) * (1 / math.sqrt(2 * math.pi))
        return _normal_cdf(z) + z * density
    gate, rest = _gate(_inner(z))
    slope = z * z
    slope *= 3 * 0.044715 * math.sqrt(2 / math.pi)
    slope += math.sqrt(2 / math.pi)
    slope *= z
    slope *= gate
    slope *= rest
    slope += gate
    return slope


def _inner(z):
    """u = √(2/π)·(z + 0.044715 z³)."""
    u = z * z
    u *= 0.044715 * math.sqrt(2 / math.pi)
    u += math.sqrt(2 / math.pi)
    u *= z
    return u


def _normal_cdf(z):
    """Φ(z), which 1 + erf loses where z is far below 0."""
    z = z * math.sqrt(0.5)
    return sharper(z, lambda: 0.5 * erfc(-z), lambda: 0.5 * (1 + erf(z)))


def _gate(u):
    """½(1 + tanh u),  1 − tanh u, which both cancel where they are small."""

    def from_tanh():
        t = np.tanh(u)
        return 0.5 * (1 + t), 1 - t

    def from_exp():
        e = np.multiply(u, -2, out=u)
        with np.errstate(over="ignore"):
            np.exp(e, out=e)
        gate = 1 + e
        np.divide(1, gate, out=gate)
        # where e overflows the gate is 0, and what is left of it 1
        np.minimum(e, np.finfo(float).max, out=e)
        e *= gate
        e *= 2
        return gate, e

    return sharper(u, from_exp, from_tanh)
