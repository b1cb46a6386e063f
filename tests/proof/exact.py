"""Every op written once more, number by number, from DESIGN's definition and the papers.

`FORMULAS[op](*inputs, **options)` gives the op's outputs as nested lists of numbers of any
precision that mpmath is set to. Nothing here is vectorised, shared with the reference, or written
with rounding in mind: sums are sums and an exponential is an exponential. `GRADIENT_FREE` names the
ops that end a graph, and why.

Inputs are indexed as arrays are, x[i, j]; integers among them are Python's or NumPy's.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
from gaugeblock.reference.catalog import CATALOG
from mpmath import mp

GRADIENT_FREE = {
    "adam": "an optimiser's step ends the graph",
    "adamw": "an optimiser's step ends the graph",
    "sample": "a choice has no gradient",
}


def array(shape, entry):
    """An object array from a function of its indices."""
    out = np.empty(shape, object)
    for index in itertools.product(*map(range, shape)):
        out[index] = entry(*index)
    return out


def total(terms):
    return sum(terms, mp.mpf(0))


def rows_of(x):
    """(leading shape, the rows along the last axis)."""
    lead = x.shape[:-1]
    return lead, x.reshape(-1, x.shape[-1])


def per_row(x, entry):
    """An array like x from a function of a row that gives a list."""
    lead, rows = rows_of(x)
    done = [entry(row) for row in rows]
    return array((*lead, len(done[0])), lambda *i: done[flat(i[:-1], lead)][i[-1]])


def flat(index, shape):
    """The place of an element in C order."""
    place = 0
    for i, n in zip(index, shape):
        place = place * n + i
    return place


def linear(x, w, b=None):
    def row(r):
        return [
            total(r[k] * w[k, n] for k in range(w.shape[0])) + (0 if b is None else b[n])
            for n in range(w.shape[1])
        ]

    return (per_row(x, row),)


def embedding(tokens, wte, wpe=None, positions=None):
    def entry(*i):
        *lead, c = i
        t = lead[-1] if positions is None else np.broadcast_to(positions, tokens.shape)[(*lead,)]
        return wte[tokens[(*lead,)], c] + (0 if wpe is None else wpe[t, c])

    return (array((*tokens.shape, wte.shape[1]), entry),)


def layer_norm(x, w, b, eps=1e-5):
    def row(r):
        mean = total(r) / len(r)
        variance = total((v - mean) ** 2 for v in r) / len(r)
        return [w[c] * (v - mean) / mp.sqrt(variance + eps) + b[c] for c, v in enumerate(r)]

    return (per_row(x, row),)


def residual_layer_norm(x, r, w, b, eps=1e-5):
    h = array(x.shape, lambda *i: x[i] + r[i])
    return (*layer_norm(h, w, b, eps), h)


def sees(i, j, b, Tq, Tk, causal=False, align="bottom_right", window=None, stride=None,
         global_tokens=0, lengths=None, cu_seqlens=None):  # fmt: skip
    """May query i of batch b see key j? Word for word from the definition."""
    n = Tk if lengths is None else lengths[b]
    if j >= n:
        return False
    place = i + n - Tq if align == "bottom_right" else i
    if cu_seqlens is not None:
        document = [d for d in range(len(cu_seqlens) - 1) if cu_seqlens[d] <= i < cu_seqlens[d + 1]]
        start, end = cu_seqlens[document[0]], cu_seqlens[document[0] + 1]
        if not start <= j < end:
            return False
        place, j = i - start, j - start
    if causal and j > place:
        return False
    if window is None or j < global_tokens or (stride and (place - j) % stride == 0):
        return True
    return place - window < j and (causal or j < place + window)


def direction(x):
    """Rows divided by their length; a row of zeros stays."""

    def row(r):
        norm = mp.sqrt(total(v**2 for v in r))
        return [v / norm if norm else v for v in r]

    return per_row(x, row)


def attention(q, k, v, temperature=None, *, score="dot", scale=None, dropout=0.0, seed=0,
              return_lse=False, **mask):  # fmt: skip
    (B, H, Tq, D), (_, Hkv, Tk, _) = q.shape, k.shape
    if scale is None:
        scale = 1 / mp.sqrt(D) if score == "dot" else mp.mpf(1)
    if score == "cosine":
        q, k = direction(q), direction(k)
    o, lse = array(q.shape, lambda *i: mp.mpf(0)), array(q.shape[:3], lambda *i: -mp.inf)
    for b, h, i in itertools.product(range(B), range(H), range(Tq)):
        g = h // (H // Hkv)
        keys = [j for j in range(Tk) if sees(i, j, b, Tq, Tk, **mask)]
        if not keys:
            continue
        beta = scale if temperature is None else scale / temperature[h]
        e = {j: mp.exp(beta * total(q[b, h, i, d] * k[b, g, j, d] for d in range(D))) for j in keys}
        lse[b, h, i] = mp.log(total(e.values()))
        for d in range(D):
            o[b, h, i, d] = total(
                e[j] / total(e.values()) * v[b, g, j, d] / (1 - dropout)
                for j in keys
                if kept(flat((b, h, i, j), (B, H, Tq, Tk)), dropout, seed)
            )
    return (o, lse) if return_lse else (o,)


def additive_attention(q, k, v, w_q, w_k, w, *, lengths=None):
    (B, Tq, C), (_, Tk, K) = q.shape, k.shape
    out = array((B, Tq, v.shape[-1]), lambda *i: mp.mpf(0))
    for b, i in itertools.product(range(B), range(Tq)):
        n = Tk if lengths is None else lengths[b]
        e = []
        for j in range(n):
            hidden = [
                total(q[b, i, c] * w_q[c, a] for c in range(C))
                + total(k[b, j, c] * w_k[c, a] for c in range(K))
                for a in range(len(w))
            ]
            e.append(mp.exp(total(w[a] * mp.tanh(z) for a, z in enumerate(hidden))))
        for d in range(v.shape[-1]):
            out[b, i, d] = total(e[j] / total(e) * v[b, j, d] for j in range(n))
    return (out,)


def paged_attention(q, k_pages, v_pages, block_table, lengths, *, window=None, scale=None):
    _, Hkv, page, D = k_pages.shape
    B, pages = block_table.shape

    def gathered(x):
        def entry(b, h, j, d):
            used = j < lengths[b]
            return x[block_table[b, j // page], h, j % page, d] if used else mp.mpf(0)

        return array((B, Hkv, pages * page, D), entry)

    k, v = gathered(k_pages), gathered(v_pages)
    return attention(q, k, v, causal=True, lengths=lengths, window=window, scale=scale)


ACTIVATIONS = {
    "gelu": lambda z: z * (1 + mp.erf(z / mp.sqrt(2))) / 2,
    "gelu_tanh": lambda z: (
        z / 2 * (1 + mp.tanh(mp.sqrt(2 / mp.pi) * (z + mp.mpf("0.044715") * z**3)))
    ),
    "relu": lambda z: z if z > 0 else z * 0,
}


def ffn(x, w1, b1, w2, b2, residual=None, *, activation="gelu_tanh"):
    (z,) = linear(x, w1, b1)
    a = array(z.shape, lambda *i: ACTIVATIONS[activation](z[i]))
    (y,) = linear(a, w2, b2)
    return (y if residual is None else array(y.shape, lambda *i: y[i] + residual[i]),)


def cross_entropy(logits, targets, *, ignore_index=-100, label_smoothing=0.0, reduction="mean"):
    V = logits.shape[-1]

    def loss(*i):
        if targets[i] == ignore_index:
            return mp.mpf(0)
        lse = mp.log(total(mp.exp(x) for x in logits[i]))
        uniform = total(lse - x for x in logits[i]) / V if label_smoothing else 0
        return (1 - label_smoothing) * (lse - logits[i][targets[i]]) + label_smoothing * uniform

    losses = array(targets.shape, loss)
    if reduction == "none":
        return (losses,)
    count = int((targets != ignore_index).sum()) if reduction == "mean" else 1
    return (array((), lambda: total(losses.flat) / count if count else mp.nan),)


def linear_cross_entropy(x, w, targets, b=None, **options):
    return cross_entropy(*linear(x, w.T, b), targets, **options)


def kept(i, p, seed):
    """Word 0 of Philox 4×32-10 at counter i under the seed is ≥ ⌊p·2³²⌋, in Python's integers."""
    seed %= 2**64
    c, k = [i % 2**32, i >> 32, 0, 0], [seed % 2**32, seed >> 32]
    for _ in range(10):
        first, second = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [second >> 32 ^ c[1] ^ k[0], second % 2**32, first >> 32 ^ c[3] ^ k[1], first % 2**32]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c[0] >= math.floor(p * 2**32)


def dropout(x, p, seed):
    def entry(*i):
        stays = p < 1 and kept(flat(i, x.shape), p, seed)
        return x[i] / (1 - p) if stays else mp.mpf(0)

    return (array(x.shape, entry),)


def adamw(p, g, m, v, step, lr, beta1, beta2, eps, weight_decay):
    m = array(p.shape, lambda *i: beta1 * m[i] + (1 - beta1) * g[i])
    v = array(p.shape, lambda *i: beta2 * v[i] + (1 - beta2) * g[i] ** 2)

    def entry(*i):
        mhat, vhat = m[i] / (1 - beta1**step), v[i] / (1 - beta2**step)
        return p[i] - lr * weight_decay * p[i] - lr * mhat / (mp.sqrt(vhat) + eps)

    return array(p.shape, entry), m, v


def adam(p, g, m, v, step, lr, beta1, beta2, eps, weight_decay=0.0):
    m = array(p.shape, lambda *i: beta1 * m[i] + (1 - beta1) * g[i])
    v = array(p.shape, lambda *i: beta2 * v[i] + (1 - beta2) * g[i] ** 2)
    rate = lr * mp.sqrt(1 - beta2**step) / (1 - beta1**step)

    def entry(*i):
        return p[i] - rate * m[i] / (mp.sqrt(v[i]) + eps) - rate * weight_decay * p[i]

    return array(p.shape, entry), m, v


def cumulative(logits, temperature=1.0, top_k=None, top_p=None, min_p=None):
    """The distribution that `sample` draws from, a row: Σ of p up to each token."""
    if temperature == 0:
        chosen = [min(v for v, x in enumerate(logits) if x == max(logits))]
    else:
        chosen = [v for v, x in enumerate(logits) if x != -mp.inf]
    s = [x / (temperature or 1) for x in logits]

    def share():
        e = {v: mp.exp(s[v] - max(s[u] for u in chosen)) for v in chosen}
        return {v: x / total(e.values()) for v, x in e.items()}

    if temperature and top_k is not None:
        kth = sorted((s[v] for v in chosen), reverse=True)[:top_k][-1]
        chosen = [v for v in chosen if s[v] >= kth]
    if temperature and top_p is not None and top_p < 1:
        p, mass = share(), mp.mpf(0)
        # the most probable first, of equals the higher index
        ranked, chosen = sorted(chosen, key=lambda v: (p[v], v), reverse=True), []
        for v in ranked:
            if mass < top_p:
                chosen.append(v)
            mass += p[v]
    if temperature and min_p is not None:
        p = share()
        chosen = [v for v in chosen if p[v] >= min_p * max(p.values())]
    p = share()
    return [total(p[u] for u in chosen if u <= v) for v in range(len(s))]


def sample(logits, u, previous=None, *, repetition_penalty=1.0, **options):
    def penalised(*i):
        x, there = logits[i], previous is not None and i[-1] in previous[i[:-1]]
        if not there:
            return x
        return x / repetition_penalty if x > 0 else x * repetition_penalty

    cdf = per_row(array(logits.shape, penalised), lambda row: cumulative(row, **options))

    def token(*i):
        return next(v for v, below in enumerate(cdf[i]) if below > u[i])

    return cdf, array(u.shape, token)


FORMULAS = {
    f.__name__: f
    for f in (
        linear, embedding, layer_norm, residual_layer_norm, attention, paged_attention, ffn,
        cross_entropy, linear_cross_entropy, dropout, adamw, sample, additive_attention, adam,
    )
}  # fmt: skip


def proved():
    """The ops of the catalog that have a formula here, in its order."""
    return [op for op in CATALOG if op in FORMULAS]
