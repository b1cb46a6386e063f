"""Softmax cross-entropy of integer targets.

    lse = log Σ_v exp(logits_v)
    loss = (1 − α)·(lse − logits_target) + α·(lse − mean_v logits_v),   0 where ignored
    dlogits = dloss·(softmax(logits) − (1 − α)·onehot(target) − α/V)

α is `label_smoothing`. "mean" divides by the number of targets that are not ignored (NaN when there
is none, as in torch). log(softmax) is never formed.

Shapes: logits (..., V); targets (...) int; loss () or, for reduction "none", (...). dtype float64.
Source: Szegedy et al. 2015, arXiv:1512.00567, section 7 (smoothing); the edges as in
torch.nn.functional.cross_entropy.
"""

import numpy as np

from ._checks import expect_choice, expect_ids, expect_shape
from ._rounding import floats, otherwise

REDUCTIONS = ("mean", "sum", "none")


def cross_entropy(logits, targets, *, ignore_index=-100, label_smoothing=0.0, reduction="mean"):
    """loss = lse − logits[target]  ->  loss, cache."""
    logits = floats(logits)
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
        loss, lse = row_losses(logits, index, kept, alpha)
        count = np.float64(kept.sum()) if reduction == "mean" else 1.0
        if reduction != "none":
            total = loss.sum()
            # or every row's loss times a share that is rounded once
            loss = otherwise(total / count, lambda: (loss * (np.ones_like(total) / count)).sum())
        p = np.exp(logits - lse)
    return loss, (p, index, kept, count, alpha)


def row_losses(logits, index, kept, alpha):
    """(loss, lse) of each row, lse (..., 1). index: the targets, (..., 1)."""
    m = logits.max(-1, keepdims=True)
    e = np.exp(logits - np.where(m == -np.inf, 0.0, m))
    with np.errstate(divide="ignore"):
        lse = np.where(m == -np.inf, 0.0, m) + np.log(e.sum(-1, keepdims=True))
    loss = (1 - alpha) * (lse - np.take_along_axis(logits, index, -1))[..., 0]
    if alpha:
        loss = loss + alpha * (lse - logits.mean(-1, keepdims=True))[..., 0]
    return np.where(kept, loss, 0.0), lse


def cross_entropy_backward(dloss, cache):
    """-> dlogits."""
    p, index, kept, count, alpha = cache
    dloss = floats(dloss)
    target = np.zeros(p.shape)
    np.put_along_axis(target, index, 1 - alpha, -1)
    with np.errstate(invalid="ignore", divide="ignore"):
        rows = np.broadcast_to(dloss / count, kept.shape)
        return (logit_gradient(rows, kept, p, target, alpha / p.shape[-1]),)


def logit_gradient(rows, kept, p, target, uniform):
    """dlogits of any columns. rows: dloss/count; target: (1 − α)·onehot; uniform: α/V."""
    return np.where(kept[..., None], rows[..., None] * (p - target - uniform), 0.0)
