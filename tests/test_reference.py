"""The reference against central differences and against torch in float64."""

import functools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from gaugeblock.reference._philox import keep_mask
from gaugeblock.reference.catalog import CATALOG
from gaugeblock.reference.oracle.budget import evaluate

# the other ops: test_reference_ops
OPS = (
    "linear", "embedding", "layer_norm", "attention", "additive_attention", "ffn", "cross_entropy",
)  # fmt: skip
POINTS = [
    pytest.param(CATALOG[name], case, id=f"{name}-{case.name}")
    for name in OPS
    for case in CATALOG[name].select("full")
    # a result that is NaN has no gradient to compare
    if not case.name.endswith(("nan_seen", "nan_key_seen", "nan_query_seen", "relu_nan"))
]
HIDDEN_NAN = "top_left_hidden_nan"


def drawn(op, case):
    rng = np.random.default_rng(list(case.name.encode()))
    inputs, options = op.draw(case, rng), op.options(case)
    outputs, _ = evaluate(op, inputs, options, None)
    # where an output is −∞ by definition its gradient is never read
    dys = tuple(np.where(np.isfinite(y), rng.standard_normal(np.shape(y)), 0.0) for y in outputs)
    return inputs, options, dys, rng


# ReLU has no derivative at 0, and a direction none
SMOOTH = [p for p in POINTS if p.values[1].name not in ("relu_at_zero", "cosine_zero_vectors")]


@pytest.mark.parametrize(("op", "case"), SMOOTH)
def test_gradients_agree_with_central_differences(op, case):
    inputs, options, dys, rng = drawn(op, case)
    _, gradients = evaluate(op, inputs, options, dys)
    directions = {n: rng.standard_normal(inputs[n].shape) for n in op.differentiable(inputs)}
    # what nobody reads stays what it is: inf − inf is NaN
    directions = {n: np.where(np.isfinite(inputs[n]), d, 0.0) for n, d in directions.items()}

    def objective(t):
        moved = {n: x + t * directions[n] if n in directions else x for n, x in inputs.items()}
        ys, _ = evaluate(op, moved, options, None)
        parts = [np.where(np.isfinite(y), y, 0.0) * dy for y, dy in zip(ys, dys)]
        return sum(p.sum() for p in parts), sum(np.abs(p).sum() for p in parts)

    def slope(h):
        return (objective(h)[0] - objective(-h)[0]) / (2 * h)

    h = 1e-5
    coarse, fine = slope(h), slope(h / 2)
    analytic = sum(
        (g * d)[np.isfinite(inputs[n])].sum() for (n, d), g in zip(directions.items(), gradients)
    )
    # what is left of the h² term after halving h, and the rounding of the two sums it divides
    scale = max(abs(analytic), *(np.abs(g).max(initial=0) for g in gradients))
    rounding = 64 * np.finfo(float).eps * (objective(0)[1] + scale) / h
    assert abs(fine - analytic) <= 2 * abs(coarse - fine) + rounding
    if "degenerate" not in case.tags and options.get("scale") != 0:
        assert abs(analytic) > 1e3 * rounding, "the check could not have failed"


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


def torch_direction(x):
    squares = (x * x).sum(-1, keepdim=True)
    zero = squares == 0
    return x * torch.where(zero, 0.0, torch.where(zero, 1.0, squares).rsqrt())


def torch_attention(q, k, v, scale=None, dropout=0.0, seed=0, return_lse=False, score="dot",
                    temperature=None, **mask):  # fmt: skip
    (B, H, Tq, D), (_, Hkv, Tk, _) = q.shape, k.shape
    visible = torch.tensor(
        [[[sees(i, j, b, Tq, Tk, **mask) for j in range(Tk)] for i in range(Tq)] for b in range(B)],
        dtype=torch.bool,
    ).reshape(B, 1, Tq, Tk)
    k, v = (
        torch.where(visible.any(2)[..., None], x, 0.0).repeat_interleave(H // Hkv, 1)
        for x in (k, v)
    )
    q = torch.where(visible.any(3, keepdim=True), q, 0.0)
    scale = (D**-0.5 if score == "dot" else 1.0) if scale is None else scale
    if score == "cosine":
        q, k = torch_direction(q), torch_direction(k)
    s = scale * (q @ k.mT)
    if temperature is not None:
        s = s / temperature[:, None, None]
    # a row of −∞ alone has no softmax: it gets finite scores, and 0 for its result
    rows = visible.any(3, keepdim=True)
    s = s.masked_fill(~visible & rows, -math.inf)
    p = s.softmax(-1)
    if dropout:
        p = p * torch.from_numpy(keep_mask(tuple(p.shape), dropout, seed)) / (1 - dropout)
    o = torch.where(rows, p @ v, 0.0)
    if not return_lse:
        return o
    return o, torch.where(rows[..., 0], s.logsumexp(-1), -math.inf)


def torch_ffn(x, w1, b1, w2, b2, activation="gelu_tanh", residual=0.0):
    act = {"gelu_tanh": functools.partial(F.gelu, approximate="tanh"), "gelu": F.gelu}
    return act.get(activation, F.relu)(x @ w1 + b1) @ w2 + b2 + residual


def torch_additive_attention(q, k, v, w_q, w_k, w, lengths=None):
    B, Tk = k.shape[:2]
    there = torch.arange(Tk) < torch.tensor(lengths or [Tk] * B)[:, None]  # (B, Tk)
    k, v = (torch.where(there[..., None], x, 0.0) for x in (k, v))
    sees = there.any(1)[:, None, None]
    q = torch.where(sees, q, 0.0)
    s = ((q @ w_q)[:, :, None] + (k @ w_k)[:, None]).tanh() @ w
    # a row without keys gets finite scores, and 0 for its result
    s = s.masked_fill(~there[:, None] & sees, -math.inf)
    return torch.where(sees, s.softmax(-1) @ v, 0.0)


TORCH = {
    "additive_attention": torch_additive_attention,
    "linear": lambda x, w, b: x @ w + b,
    "embedding": lambda tokens, wte, wpe: F.embedding(tokens, wte) + wpe[: tokens.shape[1]],
    "layer_norm": lambda x, w, b, eps=1e-5: F.layer_norm(x, x.shape[-1:], w, b, eps),
    "attention": torch_attention,
    "ffn": torch_ffn,
    "cross_entropy": lambda logits, targets, **options: F.cross_entropy(
        logits.flatten(0, -2), targets.flatten(), **options
    ),
}


@pytest.mark.parametrize(("op", "case"), POINTS)
def test_agrees_with_torch_in_float64(op, case):
    inputs, options, dys, _ = drawn(op, case)
    outputs, gradients = evaluate(op, inputs, options, dys)
    tensors = {n: torch.from_numpy(np.array(x)) for n, x in inputs.items()}
    floating = [tensors[n].requires_grad_() for n in op.differentiable(inputs)]
    theirs = op.called(TORCH[op.name])(*tensors.values(), **options)
    theirs = theirs if isinstance(theirs, tuple) else (theirs,)
    seeds = [torch.from_numpy(np.array(dy)) for dy in dys]
    their_gradients = torch.autograd.grad(theirs, floating, seeds)
    pairs = [*zip(outputs, theirs), *zip(gradients, their_gradients)]
    assert len(pairs) == len(outputs) + len(floating)
    pairs = [(ours, want.detach().numpy()) for ours, want in pairs]
    # float64 rounding of the largest terms that are added, amplified by logits of a few hundred
    terms = [x for _, x in pairs] + [inputs[n] for n in op.differentiable(inputs)]
    atol = 1e-12 * max(np.abs(x[np.isfinite(x)]).max(initial=0) for x in terms)
    for ours, want in pairs:
        np.testing.assert_allclose(ours, want, rtol=1e-11, atol=atol)


def test_the_output_of_a_hidden_nan_is_finite():
    case = next(c for c in CATALOG["attention"].cases if c.name == HIDDEN_NAN)
    inputs, options, dys, _ = drawn(CATALOG["attention"], case)
    assert np.isnan(inputs["k"]).any()
    (o,), gradients = evaluate(CATALOG["attention"], inputs, options, dys)
    assert all(np.isfinite(x).all() for x in (o, *gradients))
