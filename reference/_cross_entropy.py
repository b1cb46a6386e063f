"""Softmax cross-entropy of integer targets.

    lse = log Σ_v exp(logits_v) = m + log(1 + rest)
    loss = (1 − α)·(lse − logits_target) + α·(lse − mean_v logits_v),   0 where ignored
    dlogits = dloss·(softmax(logits) − (1 − α)·onehot(target) − α/V)

α is `label_smoothing`. "mean" divides by the number of targets that are not ignored (NaN when there
is none, as in torch). log(softmax) is never formed.

m is the largest logit and rest the sum of all exp(logits_v − m) but its own. Where a model is all
but sure, lse − logits_target and p_target − 1 are as small as rest, and are added up from it.

Shapes: logits (..., V); targets (...) int; loss () or, for reduction "none", (...). dtype float64.
Source: Szegedy et al. 2015, arXiv:1512.00567, section 7 (smoothing); the edges as in
torch.nn.functional.cross_entropy.
"""

import numpy as np

from ._checks import expect_choice, expect_ids, expect_rows, expect_shape
from ._rounding import floats, otherwise, sharper

REDUCTIONS = ("mean", "sum", "none")


def cross_entropy(logits, targets, *, ignore_index=-100, label_smoothing=0.0, reduction="mean"):
    """loss = lse − logits[target]  ->  loss, cache."""
    logits = floats(logits)
    expect_rows("cross_entropy", "logits", logits, "(..., V)")
    V = logits.shape[-1]
    expect_shape("cross_entropy", "targets", targets, "(...)", logits.shape[:-1])
    targets = expect_ids("cross_entropy", "targets", targets, V, "V", also=ignore_index)
    expect_choice("cross_entropy", "reduction", reduction, REDUCTIONS)
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"cross_entropy: label_smoothing must lie in 0 … 1, got {label_smoothing}")
    alpha = float(label_smoothing)
    kept = targets != ignore_index
    index = np.where(kept, targets, 0)[..., None]

    with np.errstate(invalid="ignore"):
        loss, _, weights = row_losses(logits, index, kept, alpha)
        count = np.float64(kept.sum()) if reduction == "mean" else 1.0
        if reduction != "none":
            total = loss.sum()
            # or every row's loss times a share that is rounded once
            loss = otherwise(total / count, lambda: (loss * (np.ones_like(total) / count)).sum())
        p = weights()
    return loss, (p, index, kept, count, alpha)


def row_losses(logits, index, kept, alpha):
    """(loss, lse, function that gives p) of each row, lse (..., 1). index: targets, (..., 1)."""
    m = logits.max(-1, keepdims=True)
    e = logits - np.where(m == -np.inf, 0.0, m)
    e = np.exp(e, out=e)
    x = np.take_along_axis(logits, index, -1)

    def exact():
        largest = logits.argmax(-1, keepdims=True)
        one = np.take_along_axis(e, largest, -1)
        # 0, and NaN where it is NaN, as with a logit of +∞
        np.put_along_axis(e, largest, 0.0 * one, -1)
        others = e.sum(-1, keepdims=True)
        np.put_along_axis(e, largest, one, -1)
        log = np.log1p(others)
        mean = (m - logits).mean(-1, keepdims=True) + log if alpha else 0.0
        loss = (1 - alpha) * (m - x + log) + alpha * mean
        return loss, m + log, lambda: np.divide(e, one + others, out=e)

    def legal():
        with np.errstate(divide="ignore"):
            lse = np.where(m == -np.inf, 0.0, m) + np.log(e.sum(-1, keepdims=True))
        mean = lse - logits.mean(-1, keepdims=True) if alpha else 0.0
        loss = (1 - alpha) * (lse - x) + alpha * mean
        return loss, lse, lambda: np.exp(logits - lse)

    loss, lse, weights = sharper(logits, exact, legal)
    return np.where(kept, loss[..., 0], 0.0), lse, weights


def cross_entropy_backward(dloss, cache):
    """-> dlogits."""
    p, index, kept, count, alpha = cache
    dloss = floats(dloss)

    def exact():
        excess = p.copy()
        np.put_along_axis(excess, index, 0.0, -1)
        at_target = alpha - excess.sum(-1, keepdims=True)
        np.put_along_axis(excess, index, at_target, -1)
        return excess

    def legal():
        return p - np.where(np.arange(p.shape[-1]) == index, 1 - alpha, 0.0)

    excess = sharper(p, exact, legal)
    with np.errstate(invalid="ignore", divide="ignore"):
        rows = np.broadcast_to(dloss / count, kept.shape)
        return (logit_gradient(rows, kept, excess, alpha / p.shape[-1]),)


def logit_gradient(rows, kept, excess, uniform):
    """dlogits of any columns, in place of excess.

    rows: dloss/count; excess: p − (1 − α)·onehot; uniform: α/V.
    """
    excess -= uniform
    excess *= rows[..., None]
    np.copyto(excess, 0.0, where=~kept[..., None])
    return excess
