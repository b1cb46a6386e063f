"""Additive attention: a one-layer network scores each pair of a query and a key.

    t = tanh(q w_q + k w_k) for every pair,   s = t·w where the key is there, else −∞
    p = softmax(s),   o = p v
    dv = pᵀ do,   ds = p ⊙ (do vᵀ − rowsum(do ⊙ o)),   dw = Σ ds t
    dz = ds w ⊙ (1 − t²),   dh_q = Σ over keys of dz,   dh_k = Σ over queries of dz
    dq = dh_q w_qᵀ,   dw_q = qᵀ dh_q,   dk = dh_k w_kᵀ,   dw_k = kᵀ dh_k

Row b has lengths[b] keys, Tk without lengths. As in `attention`, a row without keys gives o = 0 and
no gradient, and a key that is not there changes nothing, whatever it holds.

Shapes: q (B, Tq, C); k (B, Tk, K); v (B, Tk, D); w_q (C, A); w_k (K, A); w (A,); lengths (B,);
o (B, Tq, D). dtype float64.
Source: Bahdanau et al. 2015, arXiv:1409.0473, section 3.1 and appendix A.1.2, where w is v_a, w_q
is W_a and w_k is U_a.
"""

import numpy as np

from ._attention import expect_lengths, masked_softmax, mean_of_shifted, sight, visible_keys
from ._checks import expect_shape
from ._rounding import floats, sharper, stored


def additive_attention(q, k, v, w_q, w_k, w, *, lengths=None):
    """o = softmax(tanh(q w_q + k w_k)·w) v  ->  o, cache."""
    q, k, v, w_q, w_k, w = floats(q, k, v, w_q, w_k, w)
    _check(q, k, v, w_q, w_k, w, lengths)
    visible = visible_keys(q.shape[1], k.shape[1], lengths=lengths)[:, 0]
    sees, seen = sight(visible)
    q, k, v = np.where(sees, q, 0.0), np.where(seen, k, 0.0), np.where(seen, v, 0.0)

    h_q, h_k = stored(q @ w_q), stored(k @ w_k)
    z = h_q[:, :, None] + h_k[:, None]
    t = stored(np.tanh(z))
    s = np.where(visible, (t @ w[:, None])[..., 0], -np.inf)
    with np.errstate(divide="ignore", invalid="ignore"):
        p, total, _ = masked_softmax(s, sees)
    o = np.where(sees, stored(stored(p, unit=total) @ v), 0.0)
    return o, (q, k, v, w_q, w_k, w, z, t, p, o, sees)


def additive_attention_backward(do, cache):
    """-> dq, dk, dv, dw_q, dw_k, dw."""
    q, k, v, w_q, w_k, w, z, t, p, o, sees = cache
    do = np.where(sees, floats(do), 0.0)
    dv = stored(p).swapaxes(-1, -2) @ do
    dp = stored(do @ v.swapaxes(-1, -2))
    delta = sharper(dp, lambda: mean_of_shifted(p, dp), lambda: (do * o).sum(-1, keepdims=True))
    ds = stored(p * (dp - delta))[..., None]
    dw = (ds * t).sum((0, 1, 2))
    dz = ds * w * sharper(t, lambda: _slope_of_tanh(z), lambda: 1 - t * t)
    dh_q, dh_k = stored(dz.sum(2)), stored(dz.sum(1))
    dw_q, dw_k = (_rows(x).T @ _rows(dh) for x, dh in ((q, dh_q), (k, dh_k)))
    return dh_q @ w_q.T, dh_k @ w_k.T, dv, dw_q, dw_k, dw


def _slope_of_tanh(z):
    """1 − tanh² z, which cancels where tanh is nearly ±1."""
    # a cosh that overflows gives the right answer, 0
    with np.errstate(over="ignore"):
        return np.cosh(z) ** -2


def _rows(x):
    return x.reshape(-1, x.shape[-1])


def _check(q, k, v, w_q, w_k, w, lengths):
    op = "additive_attention"
    expect_shape(op, "q", q, "(B, Tq, C)", (None,) * 3)
    expect_shape(op, "k", k, "(B, Tk, K)", (len(q), None, None))
    expect_shape(op, "v", v, "(B, Tk, D)", (*k.shape[:2], None))
    expect_shape(op, "w", w, "(A,)", (None,))
    expect_shape(op, "w_q", w_q, "(C, A)", (q.shape[-1], len(w)))
    expect_shape(op, "w_k", w_k, "(K, A)", (k.shape[-1], len(w)))
    if k.shape[1] < 1:
        raise ValueError(f"{op}: Tk must be at least 1, got 0")
    if lengths is not None:
        expect_lengths(op, lengths, *k.shape[:2])
