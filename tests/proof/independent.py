"""Other people's float64 against the reference: torch, ONNX's reference evaluator, JAX.

`SOURCES[name](op, point)` gives their outputs and gradients; `covers(name, point)` says whether
they have the op and the case. The gradients are those of autograd, never a formula of ours; ONNX
has none.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import torch
import torch.nn.functional as F
from gaugeblock.reference._philox import keep_mask

from examples import onnx_reference

from .exact import sees
from .points import outputs


def visible(q, k, mask):
    """Boolean (B, 1, Tq, Tk), pair by pair from the definition."""
    B, Tq, Tk = len(q), q.shape[2], k.shape[2]
    pairs = [
        [[sees(i, j, b, Tq, Tk, **mask) for j in range(Tk)] for i in range(Tq)] for b in range(B)
    ]
    return np.array(pairs, bool).reshape(B, 1, Tq, Tk)


def _direction(xp, x):
    squares = xp.einsum("bhid,bhid->bhi", x, x)[..., None]
    zero = squares == 0
    return x * xp.where(zero, 0.0, xp.where(zero, 1.0, squares) ** -0.5)


def _attention(xp, q, k, v, temperature=None, *, score="dot", scale=None, dropout=0.0, seed=0,
               return_lse=False, **mask):  # fmt: skip
    """Attention in torch's or JAX's words, `xp`."""
    D, group = q.shape[-1], q.shape[1] // k.shape[1]
    seen = visible(q, k, mask)
    rows = xp.array(seen.any(3, keepdims=True))
    k, v = (xp.repeat(xp.where(xp.array(seen.any(2)[..., None]), x, 0.0), group) for x in (k, v))
    q = xp.where(rows, q, 0.0)
    if score == "cosine":
        q, k = _direction(xp, q), _direction(xp, k)
    scale = (D**-0.5 if score == "dot" else 1.0) if scale is None else scale
    s = xp.einsum("bhid,bhjd->bhij", q, k) * scale
    if temperature is not None:
        s = s / temperature[:, None, None]
    # a row of −∞ alone has no softmax: it gets finite scores, and 0 for its result
    s = xp.where(xp.array(seen) | ~rows, s, -math.inf)
    p = xp.softmax(s)
    if dropout:
        p = p * xp.array(keep_mask(tuple(p.shape), dropout, seed)) / (1 - dropout)
    o = xp.where(rows, xp.einsum("bhij,bhjd->bhid", p, v), 0.0)
    return (o, xp.where(rows[..., 0], xp.logsumexp(s), -math.inf)) if return_lse else o


class _Torch:
    array = staticmethod(torch.from_numpy)
    where, einsum = staticmethod(torch.where), staticmethod(torch.einsum)
    softmax = staticmethod(functools.partial(torch.softmax, dim=-1))
    logsumexp = staticmethod(functools.partial(torch.logsumexp, dim=-1))
    repeat = staticmethod(lambda x, n: x.repeat_interleave(n, 1))


def _torch_paged(q, k_pages, v_pages, table, lengths, **options):
    lengths, page = lengths.tolist(), k_pages.shape[2]
    used = torch.arange(table.shape[1]) * page < torch.tensor(lengths)[:, None]
    table = torch.where(used, table, 0).long()
    k, v = (x[table].transpose(1, 2).flatten(2, 3) for x in (k_pages, v_pages))
    return _attention(_Torch, q, k, v, causal=True, lengths=lengths, **options)


def _torch_ffn(x, w1, b1, w2, b2, residual=0.0, *, activation="gelu_tanh"):
    act = {"gelu_tanh": functools.partial(F.gelu, approximate="tanh"), "gelu": F.gelu}
    return F.linear(act.get(activation, F.relu)(F.linear(x, w1.T, b1)), w2.T, b2) + residual


def _torch_cross_entropy(logits, targets, **options):
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten(), **options)


def _torch_dropout(x, p, seed):
    kept = torch.from_numpy(keep_mask(tuple(x.shape), p, seed))
    return torch.where(kept, x * (0.0 if p == 1 else 1 / (1 - p)), 0.0)


def _torch_adamw(p, g, m, v, step, lr, beta1, beta2, eps, weight_decay):
    p = torch.nn.Parameter(p.clone())
    p.grad = g
    optimiser = torch.optim.AdamW(
        [p], lr=lr, betas=(beta1, beta2), eps=eps, weight_decay=weight_decay, foreach=False
    )
    state = {"step": torch.tensor(step - 1.0), "exp_avg": m.clone(), "exp_avg_sq": v.clone()}
    optimiser.state[p] = state
    optimiser.step()
    return p.detach(), state["exp_avg"], state["exp_avg_sq"]


def _torch_additive(q, k, v, w_q, w_k, w, *, lengths=None):
    n = torch.tensor([k.shape[1]] * len(k) if lengths is None else lengths)[:, None, None]
    seen = torch.arange(k.shape[1])[:, None] < n
    k, v, q = torch.where(seen, k, 0.0), torch.where(seen, v, 0.0), torch.where(n > 0, q, 0.0)
    s = torch.tanh((q @ w_q)[:, :, None] + (k @ w_k)[:, None]) @ w
    # a row of −∞ alone has no softmax: it gets finite scores, and 0 for its result
    s = s.masked_fill(~seen.mT & (n > 0), -math.inf)
    return torch.where(n > 0, s.softmax(-1) @ v, 0.0)


def _torch_adam(p, g, m, v, step, lr, beta1, beta2, eps, weight_decay=0.0):
    """torch's Adam corrects the moments: GPT-1's ε is so many times larger, its decay outside."""
    rate = lr * math.sqrt(1 - beta2**step) / (1 - beta1**step)
    own = eps / math.sqrt(1 - beta2**step)
    p1, m, v = _torch_adamw(p, g, m, v, step, lr, beta1, beta2, own, 0.0)
    return p1 - rate * weight_decay * p, m, v


def warped(logits, temperature=1.0, top_k=None, top_p=None, min_p=None):
    """The scores as Hugging Face's warpers leave them, in the order of `generate`."""
    import transformers

    if temperature == 0:
        return torch.where(F.one_hot(logits.argmax(-1), logits.shape[-1]).bool(), 0.0, -math.inf)
    warpers = [transformers.TemperatureLogitsWarper(float(temperature))]
    if top_k is not None:
        warpers.append(transformers.TopKLogitsWarper(top_k))
    if top_p is not None and top_p < 1:
        warpers.append(transformers.TopPLogitsWarper(top_p))
    if min_p is not None:
        warpers.append(transformers.MinPLogitsWarper(min_p))
    return transformers.LogitsProcessorList(warpers)(None, logits.clone())


def _torch_sample(logits, u, previous=None, *, repetition_penalty=1.0, **options):
    import transformers

    if previous is not None:
        penalty = transformers.RepetitionPenaltyLogitsProcessor(float(repetition_penalty))
        # its padding is a token that is there already
        rows = [row[row >= 0][None] for row in previous]
        logits = torch.cat(
            [penalty(r, x[None].clone()) if r.numel() else x[None] for r, x in zip(rows, logits)]
        )
    cdf = warped(logits, **options).softmax(-1).cumsum(-1)
    return cdf, torch.searchsorted(cdf, u[..., None], right=True)[..., 0]


TORCH = {
    "linear": lambda x, w, b=None: x @ w if b is None else torch.addmm(b, x, w),
    "embedding": lambda tokens, wte, wpe: F.embedding(tokens, wte) + wpe[: tokens.shape[1]],
    "layer_norm": lambda x, w, b, eps=1e-5: F.layer_norm(x, x.shape[-1:], w, b, eps),
    "residual_layer_norm": lambda x, r, w, b, eps=1e-5: (
        F.layer_norm(x + r, x.shape[-1:], w, b, eps), x + r
    ),
    "attention": functools.partial(_attention, _Torch),
    "paged_attention": _torch_paged,
    "ffn": _torch_ffn,
    "cross_entropy": _torch_cross_entropy,
    "linear_cross_entropy": lambda x, w, targets, b=None, **options: F.cross_entropy(
        F.linear(x, w, b), targets, **options
    ),
    "dropout": _torch_dropout,
    "adam": _torch_adam,
    "additive_attention": _torch_additive,
    "adamw": _torch_adamw,
    "sample": _torch_sample,
}  # fmt: skip


def run_torch(point):
    fn = point.op.called(TORCH[point.op.name])
    tensors = {
        n: None if x is None else torch.from_numpy(x.copy()) for n, x in point.inputs.items()
    }
    wanted = [tensors[n].requires_grad_() for n in point.differentiable()]
    y = fn(*tensors.values(), **point.options)
    ys = y if isinstance(y, tuple) else (y,)
    seeds = [torch.from_numpy(np.array(dy)) for dy in point.dys]
    gradients = torch.autograd.grad(ys, wanted, seeds) if wanted else None
    ys = [y.detach().numpy() for y in ys]
    return ys, gradients and [g.numpy() for g in gradients]


def _onnx_ffn(x, w1, b1, w2, b2, residual=0.0, *, activation="gelu_tanh"):
    approximate = {"gelu": "none", "gelu_tanh": "tanh"}[activation]
    return onnx_reference.gelu(x @ w1 + b1, approximate) @ w2 + b2 + residual


ONNX = {
    "attention": onnx_reference.attention,
    "layer_norm": onnx_reference.layer_norm,
    "ffn": _onnx_ffn,
}


def run_onnx(point):
    fn = point.op.called(ONNX[point.op.name])
    return [np.asarray(fn(*point.inputs.values(), **point.options))], None


def _jax():
    """JAX's words for `_attention`, and its functions of the ops."""
    import jax
    from jax import numpy as jnp

    class Words:
        array, where, einsum = jnp.asarray, jnp.where, jnp.einsum
        softmax = functools.partial(jax.nn.softmax, axis=-1)
        logsumexp = functools.partial(jax.nn.logsumexp, axis=-1)
        repeat = functools.partial(jnp.repeat, axis=1)

    def cross_entropy(logits, targets, reduction="mean"):
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1)
        return {"mean": jnp.mean, "sum": jnp.sum, "none": jnp.ravel}[reduction](-picked)

    def ffn(x, w1, b1, w2, b2, residual=0.0, *, activation="gelu_tanh"):
        gelu = functools.partial(jax.nn.gelu, approximate=activation == "gelu_tanh")
        a = (jax.nn.relu if activation == "relu" else gelu)(x @ w1 + b1)
        return a @ w2 + b2 + residual

    return jax, {
        "attention": functools.partial(_attention, Words),
        "layer_norm": lambda x, w, b, eps=1e-5: jax.nn.standardize(x, axis=-1, epsilon=eps) * w + b,
        "ffn": ffn,
        "cross_entropy": cross_entropy,
    }


JAX = ("attention", "layer_norm", "ffn", "cross_entropy")


def run_jax(point):
    jax, functions = _jax()
    with jax.enable_x64(True):
        names = point.differentiable()
        fn = point.op.called(functools.partial(functions[point.op.name], **point.options))

        def outputs(*changed):
            y = fn(*(point.inputs | dict(zip(names, changed))).values())
            return y if isinstance(y, tuple) else (y,)

        ys, pull = jax.vjp(outputs, *(jax.numpy.asarray(point.inputs[n]) for n in names))
        gradients = pull(tuple(jax.numpy.asarray(dy) for dy in point.dys))
        return [np.asarray(y) for y in ys], [np.asarray(g) for g in gradients]


SOURCES = {"torch": run_torch, "onnx": run_onnx, "jax": run_jax}
_OPS = {"torch": TORCH, "onnx": ONNX, "jax": JAX}


def covers(source, op, case):
    """Whether a source has the op and what the case asks of it."""
    options = op.options(case)
    if op.name not in _OPS[source]:
        return False
    if op.name == "sample":
        # which of equals stay is up to torch's sort
        return "equals" not in case.name
    if source == "onnx":
        hidden = any(word in case.name for word in ("unsee", "nan", "length", "documents"))
        lacks = {"dropout", "return_lse", "score", "stride"} & options.keys() or options.get(
            "activation"
        ) == "relu"
        # its evaluator takes the root of the scale
        below_0 = (options.get("scale") or 0) < 0
        return not lacks and not hidden and not below_0 and "degenerate" not in case.tags
    if source == "jax" and op.name == "cross_entropy":
        return not options.keys() - {"reduction"} and "ignored" not in case.name
    return True


# ONNX keeps epsilon, scale and GELU's constants in float32
ONNX_ROUNDS = ("layer_norm", "ffn")
# what is left of a cancellation is compared with what cancelled
_REMAINDER = 1e-3


def worst(source, point):
    """(largest relative error of a tensor, [(name, ours, theirs)]).

    An error is relative to the largest element of its tensor, or to a thousandth of the largest of
    all tensors and inputs where that is more.
    """
    theirs, their_gradients = SOURCES[source](point)
    names, ours = list(outputs(point.op))[: len(theirs)], point.at()
    if their_gradients is not None:
        names += [f"d{n}" for n in point.differentiable()]
        ours, theirs = (*ours, *point.gradients()), [*theirs, *their_gradients]
    found, relative = list(zip(names, ours, theirs, strict=True)), 0.0
    held = [np.isfinite(b) for b in theirs]
    largest = [np.abs(b[h]).max(initial=0) for b, h in zip(theirs, held)]
    inputs = [point.inputs[n] for n in point.floating()]
    terms = max([*largest, *(np.abs(x[np.isfinite(x)]).max(initial=0) for x in inputs)])
    for a, b, h, own in zip(ours, theirs, held, largest):
        scale = max(own, _REMAINDER * terms)
        if scale:
            relative = max(relative, float(np.abs(a[h] - b[h]).max(initial=0) / scale))
    return relative, found
