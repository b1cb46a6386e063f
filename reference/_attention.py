"""Scaled attention over the keys that a mask lets through, by dot product or by cosine.

    s = scale·q kᵀ where key j is visible to query i, else −∞
    p = softmax(s),   p̃ = p ⊙ keep/(1 − dropout),   o = p̃ v,   lse = log Σ exp(s)
    dv = p̃ᵀ do,   dp = (do vᵀ) ⊙ keep/(1 − dropout)
    ds = p ⊙ (dp − rowsum(do ⊙ o) + dlse),   dq = scale·ds k,   dk = scale·dsᵀ q

    score="cosine":  the same of q̂ = q/‖q‖ and k̂ = k/‖k‖ with scale/τ_h for scale
    dq = (dq̂ − q̂ rowsum(q̂ ⊙ dq̂))/‖q‖,   dk likewise,   dτ_h = −Σ q̂ ⊙ dq̂/τ_h over head h

Row b has n = lengths[b] keys (Tk without lengths). Query i stands at i' = i + n − Tq
(`align="bottom_right"`, the meaning of a key/value cache) or at i' = i (`align="top_left"`).
Causal: it sees keys j ≤ i'. A window of w keeps j > i' − w and, where not causal, |i' − j| < w;
exempt from the window are keys j < global_tokens and, with a stride of l, those with
(i' − j) mod l = 0: window=1 is the strided head alone, window=l the merged one. `cu_seqlens` packs
documents along T: each sees itself alone, and positions count from its start. Query head h reads
key head h // (H // Hkv).

scale is D^(−1/2) by default, and 1 for cosines; τ is `temperature`, finite and not 0, or 1. A
vector of zeros has cosine 0 with everything, and no gradient.

A query that sees nothing gives o = 0, lse = −∞ and no gradient; a key that no query sees changes
nothing, whatever it holds. Dropout keeps score ((b·H + h)·Tq + i)·Tk + j as `dropout` keeps an
element of that index.

Shapes: q, o (B, H, Tq, D); k, v (B, Hkv, Tk, D); lse (B, H, Tq); temperature (H,);
lengths (B,); cu_seqlens (n + 1,). dtype float64. Memory: three arrays of (B, H, Tq, Tk) at most.
Source: Vaswani et al. 2017, arXiv:1706.03762, equation 1; the backward as in Dao et al. 2022,
arXiv:2205.14135, appendix B; windows and global tokens as in Beltagy et al. 2020, arXiv:2004.05150;
grouped heads as in Ainslie et al. 2023, arXiv:2305.13245; strides as in Child et al. 2019,
arXiv:1904.10509, section 4; cosines as in Henry et al. 2020, arXiv:2010.04245, and, with a learned
temperature, Liu et al. 2022, arXiv:2111.09883.
"""

import numpy as np

from ._checks import expect_choice, expect_integer, expect_shape
from ._philox import expect_dropout, keep_mask
from ._rounding import floats, otherwise, rescaled, sharper, stored


def visible_keys(
    Tq,
    Tk,
    *,
    causal=False,
    align="bottom_right",
    window=None,
    stride=None,
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
        exempt = j < global_tokens
        if stride is not None:
            exempt = exempt | ((i + shift) % stride == j % stride)
        visible = visible & (near | exempt)
    return visible[:, None]


def attention(
    q,
    k,
    v,
    *,
    causal=False,
    align="bottom_right",
    window=None,
    stride=None,
    global_tokens=0,
    lengths=None,
    cu_seqlens=None,
    score="dot",
    scale=None,
    temperature=None,
    dropout=0.0,
    seed=0,
    return_lse=False,
):
    """o = softmax(scale·q kᵀ) v  ->  o, cache; ((o, lse), cache) with return_lse."""
    q, k, v, temperature = floats(q, k, v, temperature)
    _check(q, k, v, align, window, stride, global_tokens, lengths, cu_seqlens)
    _expect_score(score, temperature, q.shape[1])
    expect_dropout("attention", "dropout", dropout, seed)
    (_, H, Tq, D), (_, Hkv, Tk, _) = q.shape, k.shape

    visible = visible_keys(
        Tq, Tk, causal=causal, align=align, window=window, stride=stride,
        global_tokens=global_tokens, lengths=lengths, cu_seqlens=cu_seqlens,
    )  # fmt: skip
    keep = normal = None
    if dropout:
        keep = keep_mask((len(q), H, Tq, Tk), dropout, seed), 1 / (1 - dropout or 1)
    if score == "cosine":
        sees, seen = sight(visible)
        q, q_rate = _direction(np.where(sees, q, 0.0))
        k, k_rate = _direction(np.where(seen, k, 0.0))
        normal = q, q_rate, k, k_rate, temperature
    default = D**-0.5 if score == "dot" else 1.0
    scale = default if scale is None else float(scale)
    scale = scale if temperature is None else scale / temperature[:, None, None]
    (o, lse), cache = attend(q, k, v, visible, keep, scale)
    return ((o, lse) if return_lse else o), (*cache, Hkv, return_lse, normal)


def attend(q, k, v, visible, keep, scale):
    """(o, lse), cache of any queries over any keys, where `visible` says who sees whom.

    keep: (which weights are kept after the softmax, what those are multiplied with), for dropout;
    None keeps them all.
    """
    repeats = q.shape[1] // k.shape[1]
    sees, seen = sight(visible)
    q = _for_heads(q, sees, 1)
    k, v = (_for_heads(x, seen, repeats) for x in (k, v))

    with np.errstate(divide="ignore", invalid="ignore"):
        p, total, lse = masked_softmax(_scores(q, k, visible, scale), sees)
        o = stored(_dropped(stored(p, unit=total), keep) @ v)
    np.copyto(o, 0.0, where=~sees)
    # nothing of size Tq·Tk is saved, but for a kernel that may have done so
    p = sharper(p, lambda: None, lambda: p)
    return (o, lse[..., 0]), (q, k, v, o, p, np.where(sees, lse, 0.0), keep, visible, scale)


def attention_backward(dy, cache):
    """-> dq, dk, dv, and dtemperature where it was given. dy is do, or (do, dlse) with lse."""
    *cache, Hkv, return_lse, normal = cache
    q, k, _, _, _, _, keep, _, scale = cache
    do, dlse = floats(*dy) if return_lse else (floats(dy), None)
    p, do = weights_again(do, cache)
    dv = _over_groups(_value_gradient(p, keep, do), Hkv)
    ds = score_gradient(p, do, dlse, cache)
    dq, dk = scale * (ds @ k), _over_groups(scale * (ds.swapaxes(-1, -2) @ q), Hkv)
    if normal is None:
        return dq, dk, dv
    q, q_rate, k, k_rate, temperature = normal
    dtemperature = () if temperature is None else (-(q * dq).sum((0, 2, 3)) / temperature,)
    return _direction_gradient(dq, q, q_rate), _direction_gradient(dk, k, k_rate), dv, *dtemperature


def weights_again(do, cache):
    """p as the backward has it, and do where a query sees something."""
    q, k, _, _, p, lse, _, visible, scale = cache
    sees, _ = sight(visible)

    def exact():
        with np.errstate(invalid="ignore"):
            return masked_softmax(_scores(q, k, visible, scale), sees)[0]

    p = sharper(q, exact, lambda: otherwise(p, lambda: _weights(q, k, lse, visible, scale)))
    return p, _for_heads(do, sees, 1)


def score_gradient(p, do, dlse, cache):
    """ds = p ⊙ (dp − delta), of queries that have all their keys in the cache."""
    _, _, v, o, _, _, keep, visible, _ = cache

    def delta(dp):
        def legal():
            total = (do * o).sum(-1, keepdims=True)
            return otherwise(total, lambda: (p * dp).sum(-1, keepdims=True))

        total = sharper(dp, lambda: mean_of_shifted(p, dp), legal)
        if dlse is None:
            return total
        return total - np.where(visible.any(-1, keepdims=True), dlse[..., None], 0.0)

    return _score_gradient(p, do, v, keep, delta)


def mean_of_shifted(p, dp):
    """rowsum(p ⊙ dp), with dp shifted in place so that it is 0 at the largest weight.

    As Σ p = 1 the shift does not show in dp − rowsum(p ⊙ dp), which would cancel where one key has
    nearly all the weight: what is left is of the other keys' size, exactly 0 where there is none.
    """
    dp -= np.take_along_axis(dp, p.argmax(-1, keepdims=True), -1)
    return np.einsum("...j,...j->...", p, dp)[..., None]


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
    return _dropped(stored(p), keep).swapaxes(-1, -2) @ do


def _score_gradient(p, do, v, keep, delta):
    dp = _dropped(stored(do @ v.swapaxes(-1, -2)), keep)
    dp -= delta(dp)
    dp *= p
    return stored(dp)


def _dropped(p, keep):
    """p ⊙ keep/(1 − dropout)."""
    if keep is None:
        return p
    kept, rate = keep
    p = p * kept
    p *= rate
    return p


def masked_softmax(s, sees):
    """p, which may take the place of s, Σ exp(s − max), lse, −∞ in rows that see nothing."""
    m = np.where(sees, s.max(-1, keepdims=True, initial=-np.inf), 0.0)

    def exact():
        # in place; NumPy's exp is slow at −∞
        largest, hidden = s.argmax(-1, keepdims=True), s == -np.inf
        p = np.subtract(s, m, out=s)
        np.exp(p, out=p, where=~hidden)
        np.copyto(p, 0.0, where=hidden)
        # all keys but the largest may be too small to show in a total near 1
        one = np.take_along_axis(p, largest, -1)
        np.put_along_axis(p, largest, 0.0, -1)
        others = p.sum(-1, keepdims=True)
        np.put_along_axis(p, largest, one, -1)
        total = others + one
        p /= np.where(sees, total, 1.0)
        return p, total, m + np.where(sees, np.log1p(others), -np.inf)

    def legal():
        total = np.exp(s - m).sum(-1, keepdims=True)
        lse = m + np.log(total)
        return np.exp(s - rescaled(np.where(sees, lse, 0.0))), total, lse

    return sharper(s, exact, legal)


def _direction(x):
    """(x/‖x‖, 1/‖x‖) of rows, both 0 where x is."""
    norm = np.sqrt((x * x).sum(-1, keepdims=True))
    rate = 1 / np.where(norm == 0, np.inf, norm)
    return stored(x * rate), rate


def _direction_gradient(dxhat, xhat, rate):
    """dx = (dx̂ − x̂ rowsum(x̂ ⊙ dx̂))/‖x‖."""
    dxhat = stored(dxhat)
    return rate * (dxhat - xhat * (xhat * dxhat).sum(-1, keepdims=True))


def sight(visible):
    """(which queries see something, which keys somebody sees), (…, Tq, 1) and (…, Tk, 1)."""
    return visible.any(-1, keepdims=True), visible.any(-2)[..., None]


def _weights(q, k, lse, visible, scale):
    return np.exp(_scores(q, k, visible, scale) - rescaled(lse))


def _scores(q, k, visible, scale):
    """scale·q kᵀ where visible, else −∞."""
    s = q @ k.swapaxes(-1, -2)
    s *= scale
    s = rescaled(s)
    np.copyto(s, -np.inf, where=~visible)
    return s


def _for_heads(k, seen, repeats):
    """k of every query head, with 0 in place of what no query sees; q, where it sees nothing."""
    k = k if seen.all() else np.where(seen, k, 0.0)
    return k if repeats == 1 else np.repeat(k, repeats, axis=1)


def _over_groups(dk, Hkv):
    """The gradients of the query heads that read the same key head, added."""
    B, H, Tk, D = dk.shape
    return dk if Hkv == H else dk.reshape(B, Hkv, H // Hkv, Tk, D).sum(2)


def _expect_score(score, temperature, H):
    expect_choice("attention", "score", score, ("dot", "cosine"))
    if temperature is None:
        return
    if score != "cosine":
        raise ValueError(
            f"attention: temperature must come with score='cosine', got score={score!r}; "
            "scale multiplies dot products"
        )
    expect_shape("attention", "temperature", temperature, "(H,)", (H,))
    wrong = ~np.isfinite(temperature) | (temperature == 0)
    if wrong.any():
        raise ValueError(
            f"attention: temperature must be finite and not 0, got {temperature[wrong][0]}"
        )


def _check(q, k, v, align, window, stride, global_tokens, lengths, cu_seqlens):
    expect_shape("attention", "q", q, "(B, H, Tq, D)", (None,) * 4)
    B, H, Tq, D = q.shape
    expect_shape("attention", "k", k, "(B, Hkv, Tk, D)", (B, None, None, D))
    expect_shape("attention", "v", v, "(B, Hkv, Tk, D)", k.shape)
    expect_choice("attention", "align", align, ("bottom_right", "top_left"))
    Hkv, Tk = k.shape[1:3]
    if Tk < 1:
        raise ValueError("attention: Tk must be at least 1, got 0")
    expect_groups("attention", H, Hkv)
    expect_integer("attention", "global_tokens", global_tokens)
    expect_window("attention", window)
    if stride is not None:
        _expect_stride(stride, window)
    if global_tokens < 0:
        raise ValueError(f"attention: global_tokens must be at least 0, got {global_tokens}")
    if lengths is not None:
        expect_lengths("attention", lengths, B, Tk)
    if cu_seqlens is not None:
        if lengths is not None:
            raise ValueError("attention: cu_seqlens must come without lengths, got both; give one")
        _expect_documents(cu_seqlens, B, Tq, Tk)


def expect_groups(op, H, Hkv):
    if Hkv < 1 or H % Hkv:
        raise ValueError(f"{op}: H must be a multiple of Hkv, got H = {H}, Hkv = {Hkv}")


def expect_window(op, window):
    if window is None:
        return
    expect_integer(op, "window", window)
    if window < 1:
        raise ValueError(
            f"{op}: window must be at least 1 (a key itself), got {window}; None has no window"
        )


def _expect_stride(stride, window):
    expect_integer("attention", "stride", stride)
    if stride < 1:
        raise ValueError(f"attention: stride must be at least 1, got {stride}")
    if window is None:
        raise ValueError(
            "attention: stride must come with a window, got none; "
            "window=1 is the strided head alone, window=stride the merged one"
        )


def expect_lengths(op, lengths, B, Tk):
    expect_shape(op, "lengths", lengths, "(B,)", (B,))
    lengths = np.asarray(lengths)
    if lengths.dtype.kind not in "iu":
        raise TypeError(f"{op}: lengths must be integers, got {lengths.dtype}")
    wrong = (lengths < 0) | (lengths > Tk)
    if wrong.any():
        raise ValueError(f"{op}: lengths must lie in 0 … Tk = {Tk}, got {int(lengths[wrong][0])}")


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
