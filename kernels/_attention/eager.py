"""The plain torch twin: scores, mask, softmax, product."""

import math

import torch

from .._launch import wide
from .._philox import keep_mask


def visible_keys(
    Tq, Tk, *, causal=False, bottom_right=True, window=None, global_tokens=0, lengths=None,
    cu_seqlens=None, device=None,
):  # fmt: skip
    """Boolean (B or 1, 1, Tq, Tk): may query i see key j?"""
    i, j = torch.arange(Tq, device=device)[:, None], torch.arange(Tk, device=device)
    n = torch.full((1,), Tk, device=device) if lengths is None else lengths
    n = n[:, None, None]
    shift = n - Tq if bottom_right else torch.zeros_like(n)
    visible = (j < n).expand(len(n), Tq, Tk)
    if cu_seqlens is not None:
        # the document of a position: how many begin at or before it
        document_i, document_j = (torch.searchsorted(cu_seqlens, t, right=True) for t in (i, j))
        visible = visible & (document_i == document_j)
        i, j = i - cu_seqlens[document_i - 1], j - cu_seqlens[document_j - 1]
        shift = torch.zeros_like(n)
    if causal:
        visible = visible & (j <= i + shift)
    if window is not None:
        near = j > i + shift - window
        if not causal:
            near = near & (j < i + shift + window)
        visible = visible & (near | (j < global_tokens))
    return visible[:, None]


def eager(
    q, k, v, lengths, cu_seqlens,
    causal, bottom_right, window, global_tokens, scale, dropout, seed, precision,
):  # fmt: skip
    """-> o, lse."""
    B, H, Tq, _ = q.shape
    Hkv, Tk = k.shape[1:3]
    if lengths is None and cu_seqlens is None and window is None and not causal:
        visible = None
    else:
        visible = visible_keys(
            Tq, Tk, causal=causal, bottom_right=bottom_right, window=window,
            global_tokens=global_tokens, lengths=lengths, cu_seqlens=cu_seqlens, device=q.device,
        )  # fmt: skip
    # without these every query sees a key, and every key is seen
    blind = visible is not None and not (
        lengths is None and window is None and (not causal or (bottom_right and Tq <= Tk))
    )
    if blind:
        # what nobody sees may hold anything, NaN included, and has no gradient
        sees, seen = visible.any(-1, keepdim=True), visible.any(-2)[..., None]
        q, k, v = q.masked_fill(~sees, 0), k.masked_fill(~seen, 0), v.masked_fill(~seen, 0)
        visible = visible | ~sees
    k, v = wide(k), wide(v)
    if Hkv != H:
        # widened before: the gradients of a group are added unrounded
        k, v = (x.repeat_interleave(H // Hkv, 1) for x in (k, v))
    scores = scale * (wide(q) @ k.mT)
    if visible is not None:
        scores = scores.masked_fill(~visible, -math.inf)
    p, lse = scores.softmax(-1), scores.logsumexp(-1)
    if dropout:
        index = torch.arange(B * H * Tq * Tk, device=q.device).view(scores.shape)
        p = p * keep_mask(index, dropout, seed) * (1 / (1 - dropout) if dropout < 1 else 0.0)
    o = (wide(p.to(q.dtype)) @ v).to(q.dtype)
    if blind:
        o, lse = o.masked_fill(~sees, 0), lse.masked_fill(~sees[..., 0], -math.inf)
    return o, lse
