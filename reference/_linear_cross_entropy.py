"""The language-model head and its loss: cross-entropy of a linear map.

    logits = x wᵀ + b,   loss = cross_entropy(logits, targets)
    dlogits = dloss·(softmax(logits) − (1 − α)·onehot(target) − α/V),   0 where ignored
    dx = dlogits w,   dw = dlogitsᵀ x,   db = Σ dlogits

The logits are float32 in a kernel and are never stored; dlogits may be, for the two products.
w has the form of the token embedding, to which it may be tied. A logit of −∞ (b = −∞ for the
columns that pad a vocabulary) has probability 0. Options as in `cross_entropy`.

Shapes: x (..., C); w (V, C); targets (...) int; b (V,) or None; loss () or, for reduction "none",
(...). dtype float64.
Source: Wijmans et al. 2024, arXiv:2411.09009 (logits never stored); Hsu et al. 2024,
arXiv:2410.10989; the edges as in torch.nn.functional.cross_entropy.
"""

from ._checks import expect_choice, expect_ids, expect_rows, expect_shape
from ._cross_entropy import REDUCTIONS, cross_entropy, cross_entropy_backward
from ._linear import linear, linear_backward
from ._rounding import floats, stored

_OP = "linear_cross_entropy"


def linear_cross_entropy(
    x, w, targets, b=None, *, ignore_index=-100, label_smoothing=0.0, reduction="mean"
):
    """loss = cross_entropy(x wᵀ + b, targets)  ->  loss, cache."""
    x, w, b = floats(x, w, b)
    expect_rows(_OP, "x", x, "(..., C)")
    expect_shape(_OP, "w", w, "(V, C)", (None, x.shape[-1]))
    if b is not None:
        expect_shape(_OP, "b", b, "(V,)", w.shape[:1])
    expect_shape(_OP, "targets", targets, "(...)", x.shape[:-1])
    expect_ids(_OP, "targets", targets, len(w), "V", also=ignore_index)
    expect_choice(_OP, "reduction", reduction, REDUCTIONS)
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"{_OP}: label_smoothing must lie in 0 … 1, got {label_smoothing}")
    logits, head = linear(x, w.T, b)
    loss, cache = cross_entropy(
        logits,
        targets,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction=reduction,
    )
    return loss, (head, cache)


def linear_cross_entropy_backward(dloss, cache):
    """-> dx, dw, db (None where b was absent)."""
    head, cache = cache
    (dlogits,) = cross_entropy_backward(dloss, cache)
    dx, dw, db = linear_backward(stored(dlogits), head)
    return dx, dw.T, db
