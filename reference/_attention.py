"""Scaled dot-product attention over the keys that a mask lets through.

    s = scale·q kᵀ where key j is visible to query i, else −∞
    p = softmax(s),   p̃ = p ⊙ keep/(1 − dropout),   o = p̃ v,   lse = log Σ exp(s)
    dv = p̃ᵀ do,   dp = (do vᵀ) ⊙ keep/(1 − dropout)
    ds = p ⊙ (dp − rowsum(do ⊙ o) + dlse),   dq = scale·ds k,   dk = scale·dsᵀ q

Row b has n = lengths[b] keys (Tk without lengths). Query i stands at i' = i + n − Tq
(`align="bottom_right"`, the meaning of a key/value cache) or at i' = i (`align="top_left"`).
Causal: it sees keys j ≤ i'. A window of w keeps j > i' − w and, where not causal, |i' − j| < w;
keys j < global_tokens are exempt from the window. `cu_seqlens` packs documents along T: each sees
itself alone, and positions count from its start. Query head h reads key head h // (H // Hkv).

A query that sees nothing gives o = 0, lse = −∞ and no gradient; a key that no query sees changes
nothing, whatever it holds. Dropout keeps score ((b·H + h)·Tq + i)·Tk + j as `dropout` keeps an
element of that index.

Shapes: q, o (B, H, Tq, D); k, v (B, Hkv, Tk, D); lse (B, H, Tq); lengths (B,); cu_seqlens (n + 1,).
dtype float64.
Source: Vaswani et al. 2017, arXiv:1706.03762, equation 1; the backward as in Dao et al. 2022,
arXiv:2205.14135, appendix B; windows and global tokens as in Beltagy et al. 2020, arXiv:2004.05150;
grouped heads as in Ainslie et al. 2023, arXiv:2305.13245.
"""

import numpy as np

from ._checks import expect_choice, expect_integer, expect_shape
from ._philox import expect_dropout, keep_mask
from ._rounding import floats, otherwise, rescaled, stored


def visible_keys(
    Tq,
    Tk,
    *,
    causal=False,
    align="bottom_right",
    window=None,
    global_tokens=0,
    lengths=None,
    cu_seqlens=None,
    queries=None,
    keys=None,
):
    """Boolean (B or 1, 1, Tq, Tk): may query i see key j? `queries`, `keys` choose some."""
    i = (np.arange(Tq) if queries is None else np.asarray(queries))[:, None]
    j = np.arange(Tk) if keys is None else np.asarray(keys)
    n = np.array(Tk) if lengths is None else np.asarray(lengths, np.int64)[:, None, None]
    shift = n - Tq if align == "bottom_right" else 0
    visible = np.broadcast_to(j < n, np.broadcast_shapes(np.shape(n), (1, len(i), len(j))))
    if cu_seqlens is not None:
        starts = np.asarray(cu_seqlens, np.int64)
        document_i, document_j = (np.searchsorted(starts, t, side="right") for t in (i, j))
        visible = visible & (document_i == document_j)
        shift, i, j = 0, i - starts[document_i - 1], j - starts[document_j - 1]
    if causal:
        visible = visible & (j <= i + shift)
    if window is not None:
        near = j > i + shift - window
        if not causal:
            near = near & (j < i + shift + window)
        visible = visible & (near | (j < global_tokens))
    return visible[:, None]


def attention(
    q,
    k,
    v,
    *,
    causal=False,
    align="bottom_right",
    window=None,
    global_tokens=0,
    lengths=None,
    cu_seqlens=None,
    scale=None,
    dropout=0.0,
    seed=0,
    return_lse=False,
):
    """o = softmax(scale·q kᵀ) v  ->  o, cache; ((o, lse), cache) with return_lse."""
    q, k, v = floats(q, k, v)
    _check(q, k, v, align, window, global_tokens, lengths, cu_seqlens)
    expect_dropout("attention", "dropout", dropout, seed)
    (_, H, Tq, D), (_, Hkv, Tk, _) = q.shape, k.shape
    scale = D**-0.5 if scale is None else float(scale)

    visible = visible_keys(
        Tq, Tk, causal=causal, align=align, window=window, global_tokens=global_tokens,
        lengths=lengths, cu_seqlens=cu_seqlens,
    )  # fmt: skip
    keep = 1.0
    if dropout:
        keep = keep_mask((len(q), H, Tq, Tk), dropout, seed) / (1 - dropout or 1)
    (o, lse), cache = attend(q, k, v, visible, keep, scale)
    return ((o, lse) if return_lse else o), (*cache, Hkv, return_lse)


def attend(q, k, v, visible, keep, scale):
    """(o, lse), cache of any queries over any keys, where `visible` says who sees whom.

    keep: what the weights are multiplied with after the softmax, for dropout.
    """
    repeats = q.shape[1] // k.shape[1]
    sees, seen = visible.any(-1, keepdims=True), visible.any(-2)[..., None]
    q = np.where(sees, q, 0.0)
    k, v = (_for_heads(x, seen, repeats) for x in (k, v))

    with np.errstate(divide="ignore", invalid="ignore"):
        s = _scores(q, k, visible, scale)
        m = np.where(sees, s.max(-1, keepdims=True, initial=-np.inf), 0.0)
        total = np.exp(s - m).sum(-1, keepdims=True)
        lse = m + np.log(total)
        lse_seen = np.where(sees, lse, 0.0)
        p = np.exp(s - rescaled(lse_seen))
        o = np.where(sees, stored(stored(p, unit=total) * keep @ v), 0.0)
    return (o, lse[..., 0]), (q, k, v, o, p, lse_seen, keep, visible, scale)


def attention_backward(dy, cache):
    """-> dq, dk, dv. dy is do, or (do, dlse) where lse was returned."""
    *cache, Hkv, return_lse = cache
    q, k, _, _, _, _, keep, _, scale = cache
    do, dlse = floats(*dy) if return_lse else (floats(dy), None)
    p, do = weights_again(do, cache)
    dv = _value_gradient(p, keep, do)
    ds = score_gradient(p, do, dlse, cache)
    dq, dk = scale * (ds @ k), scale * (ds.swapaxes(-1, -2) @ q)
    return dq, _over_groups(dk, Hkv), _over_groups(dv, Hkv)


def weights_again(do, cache):
    """p as the backward has it, and do where a query sees something."""
    q, k, _, _, p, lse, _, visible, scale = cache
    # nothing of size Tq·Tk is saved in a fused kernel: it computes the scores again
    p = otherwise(p, lambda: _weights(q, k, lse, visible, scale))
    return p, np.where(visible.any(-1, keepdims=True), do, 0.0)


def score_gradient(p, do, dlse, cache):
    """ds = p ⊙ (dp − delta), of queries that have all their keys in the cache."""
    _, _, v, o, _, _, keep, visible, _ = cache

    def delta(dp):
        total = (do * o).sum(-1, keepdims=True)
        total = otherwise(total, lambda: (p * dp).sum(-1, keepdims=True))
        if dlse is None:
            return total
        return total - np.where(visible.any(-1, keepdims=True), dlse[..., None], 0.0)

    return _score_gradient(p, do, v, keep, delta)


def key_gradients(do, q, k, v, lse, delta, visible, keep, scale):
    """-> dk, dv of some keys from all queries that see them.

    lse, delta (..., n, 1) are those of the queries over all their keys; delta less dlse.
    """
    Hkv, repeats = k.shape[1], q.shape[1] // k.shape[1]
    seen = visible.any(-2)[..., None]
    k, v = (_for_heads(x, seen, repeats) for x in (k, v))
    p = _weights(q, k, lse, visible, scale)
    dv = _value_gradient(p, keep, do)
    ds = _score_gradient(p, do, v, keep, lambda dp: delta)
    dk = scale * (ds.swapaxes(-1, -2) @ q)
    return _over_groups(dk, Hkv), _over_groups(dv, Hkv)


def _value_gradient(p, keep, do):
    return (stored(p) * keep).swapaxes(-1, -2) @ do


def _score_gradient(p, do, v, keep, delta):
    dp = stored(do @ v.swapaxes(-1, -2)) * keep
    return stored(p * (dp - delta(dp)))


def _weights(q, k, lse, visible, scale):
    return np.exp(_scores(q, k, visible, scale) - rescaled(lse))


def _scores(q, k, visible, scale):
    """scale·q kᵀ where visible, else −∞."""
    return np.where(visible, rescaled(scale * (q @ k.swapaxes(-1, -2))), -np.inf)


def _for_heads(k, seen, repeats):
    """k of every query head, with 0 in place of what no query sees."""
    k = k if seen.all() else np.where(seen, k, 0.0)
    return k if repeats == 1 else np.repeat(k, repeats, axis=1)


def _over_groups(dk, Hkv):
    """The gradients of the query heads that read the same key head, added."""
    B, H, Tk, D = dk.shape
    return dk if Hkv == H else dk.reshape(B, Hkv, H // Hkv, Tk, D).sum(2)


def _check(q, k, v, align, window, global_tokens, lengths, cu_seqlens):
    expect_shape("attention", "q", q, "(B, H, Tq, D)", (None,) * 4)
    B, H, Tq, D = q.shape
    expect_shape("attention", "k", k, "(B, Hkv, Tk, D)", (B, None, None, D))
    expect_shape("attention", "v", v, "(B, Hkv, Tk, D)", k.shape)
    expect_choice("attention", "align", align, ("bottom_right", "top_left"))
    Hkv, Tk = k.shape[1:3]
    if Tk < 1:
        raise ValueError("attention: Tk must be at least 1, got 0")
    if Hkv < 1 or H % Hkv:
        raise ValueError(f"attention: H must be a multiple of Hkv, got H = {H}, Hkv = {Hkv}")
    expect_integer("attention", "global_tokens", global_tokens)
    if window is not None:
        expect_integer("attention", "window", window)
    if window is not None and window < 1:
        raise ValueError(
            f"attention: window must be at least 1 (a key itself), got {window}; None has no window"
        )
    if global_tokens < 0:
        raise ValueError(f"attention: global_tokens must be at least 0, got {global_tokens}")
    if lengths is not None:
        _expect_lengths(lengths, B, Tk)
    if cu_seqlens is not None:
        if lengths is not None:
            raise ValueError("attention: cu_seqlens must come without lengths, got both; give one")
        _expect_documents(cu_seqlens, B, Tq, Tk)


def _expect_lengths(lengths, B, Tk):
    expect_shape("attention", "lengths", lengths, "(B,)", (B,))
    lengths = np.asarray(lengths)
    if lengths.dtype.kind not in "iu":
        raise TypeError(f"attention: lengths must be integers, got {lengths.dtype}")
    wrong = (lengths < 0) | (lengths > Tk)
    if wrong.any():
        raise ValueError(
            f"attention: lengths must lie in 0 … Tk = {Tk}, got {int(lengths[wrong][0])}"
        )


def _expect_documents(cu_seqlens, B, Tq, Tk):
    expect_shape("attention", "cu_seqlens", cu_seqlens, "(n + 1,)", (None,))
    starts = np.asarray(cu_seqlens)
    if starts.dtype.kind not in "iu":
        raise TypeError(f"attention: cu_seqlens must be integers, got {starts.dtype}")
    if B != 1 or Tq != Tk:
        raise ValueError(
            "attention: q must have shape (1, H, T, D) and k (1, Hkv, T, D) with cu_seqlens, "
            f"got B = {B}, Tq = {Tq}, Tk = {Tk}"
        )
    if len(starts) < 2 or starts[0] != 0 or starts[-1] != Tk or (np.diff(starts) < 0).any():
        raise ValueError(
            f"attention: cu_seqlens must rise from 0 to T = {Tk}, got {starts.tolist()}"
        )
