"""Plain torch, as a user writes it: each operator is a kernel of its own."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch.optim.adamw import adamw as step_adamw

from . import Provider
from ._limits import masked

NAMES = ("torch_eager",)


def load(device):
    return [Provider("torch_eager", torch.__version__, OPS, limits, "plain torch, not compiled")]


def limits(op, case, dtype, direction):
    if op.name != "attention" or not masked(op, case):
        return None
    sizes, options = op.dims(case), op.options(case)
    plain = options.get("align") == "top_left" and options.get("window") is None
    if sizes["Tq"] > sizes["Tk"] and not plain:
        return "gives NaN to a query that sees no key"
    return None


def embedding(tokens, wte, wpe):
    return F.embedding(tokens, wte) + wpe[: tokens.shape[1]]


def linear(x, w, b):
    return F.linear(x, w.t(), b)


def layer_norm(x, w, b, eps=1e-5):
    return F.layer_norm(x, x.shape[-1:], w, b, eps)


def residual_layer_norm(x, r, w, b, eps=1e-5):
    h = x + r
    return layer_norm(h, w, b, eps), h


def attention(
    q, k, v, *, causal=False, align="bottom_right", window=None, scale=None, return_lse=False
):
    (H, Tq, D), (Hkv, Tk) = q.shape[1:], k.shape[1:3]
    if Hkv != H:
        k, v = (x.repeat_interleave(H // Hkv, 1) for x in (k, v))
    s = q @ k.mT * (D**-0.5 if scale is None else scale)
    shift = Tk - Tq if align == "bottom_right" else 0
    hidden = _hidden(Tq, Tk, shift, causal, window, q.device)
    if hidden is not None:
        s = s.masked_fill(hidden, -math.inf)
    o = s.softmax(-1) @ v
    return (o, s.float().logsumexp(-1)) if return_lse else o


def _hidden(Tq, Tk, shift, causal, window, device):
    """Boolean (Tq, Tk): query i does not see key j; None where all see all."""
    if not causal and window is None:
        return None
    i = torch.arange(Tq, device=device)[:, None] + shift
    j = torch.arange(Tk, device=device)
    if window is None:
        return j > i
    return (j > (i if causal else i + window - 1)) | (j <= i - window)


def ffn(x, w1, b1, w2, b2, activation="gelu_tanh"):
    z = F.linear(x, w1.t(), b1)
    if activation == "relu":
        a = F.relu(z)
    else:
        a = F.gelu(z, approximate="tanh" if activation == "gelu_tanh" else "none")
    return F.linear(a, w2.t(), b2)


def cross_entropy(logits, targets, *, ignore_index=-100, label_smoothing=0.0, reduction="mean"):
    loss = F.cross_entropy(
        logits.flatten(0, -2), targets.flatten(), ignore_index=ignore_index,
        label_smoothing=label_smoothing, reduction=reduction,
    )  # fmt: skip
    return loss.view(targets.shape) if reduction == "none" else loss


def linear_cross_entropy(
    x, w, targets, b=None, *, ignore_index=-100, label_smoothing=0.0, reduction="mean"
):
    return cross_entropy(
        F.linear(x, w, b), targets, ignore_index=ignore_index, label_smoothing=label_smoothing,
        reduction=reduction,
    )  # fmt: skip


def adamw(p, g, m, v, step, lr, beta1, beta2, eps, weight_decay):
    """In place, by torch's choice of a loop or its foreach kernels."""
    step_adamw(
        [p], [g], [m], [v], [], [torch.tensor(step - 1.0)],
        amsgrad=False, beta1=beta1, beta2=beta2, lr=lr, weight_decay=weight_decay, eps=eps,
        maximize=False,
    )  # fmt: skip


def sample(logits, u, temperature=1.0, top_k=None, top_p=None, min_p=None):
    """The filters as masks over the logits, each on what the one before has left."""
    if temperature == 0:
        return logits.argmax(-1)
    s = logits.float() / temperature
    if top_k is not None and top_k < s.shape[-1]:
        s = s.masked_fill(s < s.topk(top_k).values[..., -1:], -math.inf)
    if top_p is not None and top_p < 1:
        p, order = s.softmax(-1).sort(-1)
        goes = p.cumsum(-1) <= 1 - top_p
        goes[..., -1] = False
        s = s.masked_fill(torch.zeros_like(goes).scatter(-1, order, goes), -math.inf)
    if min_p is not None:
        p = s.softmax(-1)
        s = s.masked_fill(p < min_p * p.amax(-1, keepdim=True), -math.inf)
    cdf = s.softmax(-1).cumsum(-1)
    token = torch.searchsorted(cdf, u[..., None] * cdf[..., -1:], right=True)
    return token.squeeze(-1).clamp(max=s.shape[-1] - 1)


OPS = {
    fn.__name__: fn
    for fn in (
        embedding, linear, layer_norm, residual_layer_norm, attention, ffn, cross_entropy,
        linear_cross_entropy, adamw, sample,
    )
}  # fmt: skip
