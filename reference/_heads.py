"""Heads: the language model's, and those that fine-tune a GPT on a task as GPT-1 did.

    head:             logits = h wᵀ + b
    classification:   logits = head(h at the extract token)
    similarity:       logits = head(h¹ + h²), two sequences with the texts in both orders
    multiple choice:  logits_k = head(hᵏ), one score for each choice, softmax over them

The extract token is the last of a sequence, `_classify_`; h is what the language model's head
reads. w has the form of an embedding, one row an output.

Shapes: h (B, T, C), (B, 2, T, C) for similarity, (B, K, T, C) for multiple choice; extract (B,),
(B, 2) or (B, K) int; w (K, C), (1, C) for multiple choice; b (K,) or (1,) or None; logits (B, K).
dtype float64.
Source: Radford et al. 2018, sections 3.2 and 3.3, figure 1.
"""

import numpy as np

from ._checks import expect_ids, expect_shape
from ._rounding import floats


def head(h, w, b=None):
    """logits = h wᵀ + b  ->  logits, cache."""
    logits = h @ w.T
    return logits if b is None else logits + b, (h, w, b is not None)


def head_backward(dlogits, cache):
    """-> dh, dw, db (None where b was absent)."""
    h, w, has_b = cache
    rows = dlogits.reshape(-1, dlogits.shape[-1])
    dw = rows.T @ h.reshape(-1, h.shape[-1])
    return dlogits @ w, dw, rows.sum(0) if has_b else None


def classification_head(h, extract, w, b=None):
    """-> logits (B, K), cache."""
    h, w, b = _expect("classification_head", h, extract, w, b, "(B, T, C)", 3)
    x, at = _at(h, extract)
    logits, cache = head(x, w, b)
    return logits, (cache, at, h)


def classification_head_backward(dlogits, cache):
    """-> dh, dw, db (None where b was absent)."""
    cache, at, h = cache
    dx, dw, db = head_backward(floats(dlogits), cache)
    return _at_backward(dx, at, h), dw, db


def similarity_head(h, extract, w, b=None):
    """-> logits (B, K), cache."""
    h, w, b = _expect("similarity_head", h, extract, w, b, "(B, 2, T, C)", 4)
    if h.shape[1] != 2:
        raise ValueError(f"similarity_head: h must hold both orders (B, 2, T, C), got {h.shape}")
    x, at = _at(h, extract)
    logits, cache = head(x[:, 0] + x[:, 1], w, b)
    return logits, (cache, at, h)


def similarity_head_backward(dlogits, cache):
    """-> dh, dw, db (None where b was absent)."""
    cache, at, h = cache
    dx, dw, db = head_backward(floats(dlogits), cache)
    return _at_backward(np.stack([dx, dx], 1), at, h), dw, db


def multiple_choice_head(h, extract, w, b=None):
    """-> logits (B, K), cache."""
    h, w, b = _expect("multiple_choice_head", h, extract, w, b, "(B, K, T, C)", 4)
    expect_shape("multiple_choice_head", "w", w, "(1, C)", (1, h.shape[-1]))
    x, at = _at(h, extract)
    logits, cache = head(x, w, b)
    return logits[..., 0], (cache, at, h)


def multiple_choice_head_backward(dlogits, cache):
    """-> dh, dw, db (None where b was absent)."""
    cache, at, h = cache
    dx, dw, db = head_backward(floats(dlogits)[..., None], cache)
    return _at_backward(dx, at, h), dw, db


def _at(h, extract):
    """h at the extract tokens (..., C), and where that is."""
    at = np.asarray(extract)[..., None, None]
    return np.take_along_axis(h, at, -2)[..., 0, :], at


def _at_backward(dx, at, h):
    dh = np.zeros_like(h)
    np.put_along_axis(dh, at, dx[..., None, :], -2)
    return dh


def _expect(name, h, extract, w, b, rule, ndim):
    h, w, b = floats(h, w, b)
    expect_shape(name, "h", h, rule, (None,) * ndim)
    expect_shape(name, "extract", extract, rule.replace(", T, C", ""), h.shape[:-2])
    expect_ids(name, "extract", extract, h.shape[-2], "T")
    expect_shape(name, "w", w, "(K, C)", (None, h.shape[-1]))
    if b is not None:
        expect_shape(name, "b", b, "(K,)", w.shape[:1])
    return h, w, b
