"""The plain torch twins: the CPU implementation and the readable statement of each kernel.

16-bit inputs are computed in float32 and rounded where the kernels round. Gradients are autograd's.
"""

import math

import torch
import torch.nn.functional as F


def _wide(x):
    return x if x.dtype == torch.float64 else x.float()


def layer_norm(x, w, b, eps=1e-5):
    """y = w ⊙ (x − μ)/√(σ² + ε) + b; see `gaugeblock.kernels.layer_norm`."""
    centred = _wide(x) - _wide(x).mean(-1, keepdim=True)
    centred = centred - centred.mean(-1, keepdim=True)
    xhat = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    return (_wide(w) * xhat + _wide(b)).to(x.dtype)


def visible_keys(Tq, Tk, causal=False, align="bottom_right", device=None):
    """Boolean (Tq, Tk): may query i see key j?"""
    if not causal:
        return torch.ones(Tq, Tk, dtype=torch.bool, device=device)
    shift = Tk - Tq if align == "bottom_right" else 0
    return torch.ones(Tq, Tk, dtype=torch.bool, device=device).tril(shift)


def attention(q, k, v, *, causal=False, align="bottom_right", scale=None, return_lse=False):
    """o = softmax(scale·q kᵀ) v over visible keys; see `gaugeblock.kernels.attention`."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    visible = visible_keys(q.shape[2], k.shape[2], causal, align, q.device)
    sees, seen = visible.any(1)[:, None], visible.any(0)[:, None]
    # what nobody sees may hold anything, NaN included
    q, k, v = (x.where(keep, x.new_zeros(())) for x, keep in ((q, sees), (k, seen), (v, seen)))
    scores = (scale * (_wide(q) @ _wide(k).mT)).masked_fill(~visible, -math.inf)
    # a row without keys has no softmax: any finite scores do, its weights are then set to 0
    p = scores.masked_fill(~sees, 0.0).softmax(-1).masked_fill(~sees, 0.0)
    o = (_wide(p.to(v.dtype)) @ _wide(v)).to(q.dtype)
    # gives rows that see nothing a zero that passes no NaN gradient back
    o = o.where(sees, o.new_zeros(()))
    if not return_lse:
        return o
    lse = scores.masked_fill(~sees, 0.0).logsumexp(-1)
    return o, lse.masked_fill(~sees[:, 0], -math.inf)


_ACTIVATIONS = {
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "gelu": F.gelu,
    "relu": F.relu,
}


def ffn(x, w1, b1, w2, b2, activation="gelu_tanh"):
    """y = f(x w1 + b1) w2 + b2; see `gaugeblock.kernels.ffn`."""
    z = F.linear(x, w1.t(), b1)
    return F.linear(_ACTIVATIONS[activation](z), w2.t(), b2)


def cross_entropy(
    logits, targets, *, ignore_index=-100, label_smoothing=0.0, reduction="mean"
):
    """loss = lse − logits[target]; see `gaugeblock.kernels.cross_entropy`."""
    kept = targets != ignore_index
    x = _wide(logits)
    lse = x.logsumexp(-1)
    picked = x.gather(-1, targets.where(kept, targets.new_zeros(())).long()[..., None])[..., 0]
    losses = (1 - label_smoothing) * (lse - picked)
    if label_smoothing:
        losses = losses + label_smoothing * (lse - x.mean(-1))
    return reduce_losses(losses.where(kept, losses.new_zeros(())), kept, reduction)


def reduce_losses(losses, kept, reduction):
    """"none", "sum", or the "mean" over the kept ones."""
    if reduction == "none":
        return losses
    return losses.sum() / kept.sum() if reduction == "mean" else losses.sum()
