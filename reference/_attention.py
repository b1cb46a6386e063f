"""Scaled dot-product attention with a causal or no mask.

    s = scale·q kᵀ where key j is visible to query i, else −∞
    p = softmax(s),   o = p v,   lse = log Σ exp(s)
    dv = pᵀ do,   dp = do vᵀ,   ds = p ⊙ (dp − rowsum(do ⊙ o) + dlse)
    dq = scale·ds k,   dk = scale·dsᵀ q

Causal: query i sees keys j ≤ i', with i' = i + Tk − Tq (`align="bottom_right"`, the meaning of a
key/value cache) or i' = i (`align="top_left"`). A query that sees nothing gives o = 0, lse = −∞ and
no gradient; a key that no query sees changes nothing, whatever it holds.

Shapes: q, o (B, H, Tq, D); k, v (B, H, Tk, D); lse (B, H, Tq). dtype float64.
Source: Vaswani et al. 2017, arXiv:1706.03762, equation 1; the backward as in Dao et al. 2022,
arXiv:2205.14135, appendix B.
"""

import numpy as np

from ._checks import expect_choice, expect_shape
from ._rounding import floats, rescaled, stored


def _visible_keys(Tq, Tk, causal=False, align="bottom_right"):
    """Boolean (Tq, Tk): may query i see key j?"""
    if not causal:
        return np.ones((Tq, Tk), bool)
    shift = Tk - Tq if align == "bottom_right" else 0
    return np.arange(Tk) <= np.arange(Tq)[:, None] + shift


def attention(q, k, v, *, causal=False, align="bottom_right", scale=None, return_lse=False):
    """o = softmax(scale·q kᵀ) v  ->  o, cache; ((o, lse), cache) with return_lse."""
    q, k, v = floats(q, k, v)
    expect_shape("attention", "q", q, "(B, H, Tq, D)", (None,) * 4)
    B, H, Tq, D = q.shape
    expect_shape("attention", "k", k, "(B, H, Tk, D)", (B, H, None, D))
    expect_shape("attention", "v", v, "(B, H, Tk, D)", k.shape)
    expect_choice("attention", "align", align, ("bottom_right", "top_left"))
    if k.shape[2] < 1:
        raise ValueError("attention: Tk must be at least 1, got 0")
    scale = D**-0.5 if scale is None else float(scale)

    visible = _visible_keys(Tq, k.shape[2], causal, align)
    sees, seen = visible.any(1)[:, None], visible.any(0)[:, None]
    q = np.where(sees, q, 0.0)
    k = np.where(seen, k, 0.0)
    v = np.where(seen, v, 0.0)

    s = np.where(visible, rescaled(scale * (q @ k.swapaxes(-1, -2))), -np.inf)
    m = np.where(sees, s.max(-1, keepdims=True), 0.0)
    total = np.exp(s - m).sum(-1, keepdims=True)
    with np.errstate(divide="ignore"):
        lse = m + np.log(total)
    p = np.exp(s - rescaled(np.where(sees, lse, 0.0)))
    o = stored(stored(p, unit=total) @ v)
    lse = lse[..., 0]
    cache = (q, k, v, o, p, total, sees, scale, return_lse)
    return ((o, lse) if return_lse else o), cache


def attention_backward(dy, cache):
    """-> dq, dk, dv. dy is do, or (do, dlse) where lse was returned."""
    q, k, v, o, p, total, sees, scale, return_lse = cache
    do, dlse = floats(*dy) if return_lse else (floats(dy), None)
    do = np.where(sees, do, 0.0)
    dv = stored(p, unit=total).swapaxes(-1, -2) @ do
    dp = stored(do @ v.swapaxes(-1, -2))
    delta = (do * o).sum(-1, keepdims=True)
    if dlse is not None:
        delta = delta - np.where(sees, dlse[..., None], 0.0)
    ds = stored(p * (dp - delta))
    return scale * (ds @ k), scale * (ds.swapaxes(-1, -2) @ q), dv
