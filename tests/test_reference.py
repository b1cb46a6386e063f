"""The reference against central differences and against torch in float64."""

import functools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from gaugeblock.reference.catalog import CATALOG
from gaugeblock.reference.oracle.budget import evaluate

from gaugeblock import kernels, reference

POINTS = [
    pytest.param(op, case, id=f"{op.name}-{case.name}")
    for op in CATALOG.values()
    for case in op.select("full")
]
HIDDEN_NAN = "top_left_hidden_nan"


def drawn(op, case):
    rng = np.random.default_rng(list(case.name.encode()))
    inputs, options = op.draw(case, rng), op.options(case)
    outputs, _ = evaluate(op, inputs, options, None)
    # where an output is −∞ by definition its gradient is never read
    dys = tuple(np.where(np.isfinite(y), rng.standard_normal(np.shape(y)), 0.0) for y in outputs)
    return inputs, options, dys, rng


@pytest.mark.parametrize(("op", "case"), POINTS)
def test_gradients_agree_with_central_differences(op, case):
    inputs, options, dys, rng = drawn(op, case)
    _, gradients = evaluate(op, inputs, options, dys)
    directions = {n: rng.standard_normal(inputs[n].shape) for n in op.floating()}

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


def torch_attention(q, k, v, causal=False, align="bottom_right", scale=None, return_lse=False):
    Tq, Tk = q.shape[2], k.shape[2]
    mask = torch.ones(Tq, Tk, dtype=torch.bool)
    if causal:
        mask = mask.tril(Tk - Tq if align == "bottom_right" else 0)
    rows, keys = mask.any(1), mask.any(0)
    # torch gives NaN where a query sees nothing and where a hidden key holds one
    o = torch.zeros_like(q)
    seen = F.scaled_dot_product_attention(
        q[:, :, rows], k[:, :, keys], v[:, :, keys], attn_mask=mask[rows][:, keys], scale=scale
    )
    o = o.index_copy(2, rows.nonzero()[:, 0], seen)
    if not return_lse:
        return o
    s = (q[:, :, rows] @ k.mT) * (scale or q.shape[-1] ** -0.5)
    lse = s.masked_fill(~mask[rows], -math.inf).logsumexp(-1)
    return o, torch.full(q.shape[:3], -math.inf).double().index_copy(2, rows.nonzero()[:, 0], lse)


def torch_ffn(x, w1, b1, w2, b2, activation="gelu_tanh"):
    act = {"gelu_tanh": functools.partial(F.gelu, approximate="tanh"), "gelu": F.gelu}
    return act.get(activation, F.relu)(x @ w1 + b1) @ w2 + b2


TORCH = {
    "linear": lambda x, w, b: x @ w + b,
    "embedding": lambda tokens, wte, wpe: F.embedding(tokens, wte) + wpe[: tokens.shape[1]],
    "layer_norm": lambda x, w, b, eps=1e-5: F.layer_norm(x, x.shape[-1:], w, b, eps),
    "attention": torch_attention,
    "ffn": torch_ffn,
    "cross_entropy": F.cross_entropy,
}


@pytest.mark.parametrize(("op", "case"), POINTS)
def test_agrees_with_torch_in_float64(op, case):
    inputs, options, dys, _ = drawn(op, case)
    outputs, gradients = evaluate(op, inputs, options, dys)
    tensors = {n: torch.from_numpy(np.array(x)) for n, x in inputs.items()}
    floating = [tensors[n].requires_grad_() for n in op.floating()]
    torch_fn = TORCH.get(op.name) or getattr(kernels.eager, op.name)
    theirs = torch_fn(*tensors.values(), **options)
    theirs = theirs if isinstance(theirs, tuple) else (theirs,)
    seeds = [torch.from_numpy(np.array(dy)) for dy in dys]
    their_gradients = torch.autograd.grad(theirs, floating, seeds)
    pairs = [*zip(outputs, theirs), *zip(gradients, their_gradients)]
    assert len(pairs) == len(outputs) + len(floating)
    pairs = [(ours, want.detach().numpy()) for ours, want in pairs]
    # float64 rounding of the largest terms that are added, amplified by logits of a few hundred
    terms = [x for _, x in pairs] + [inputs[n] for n in op.floating()]
    atol = 1e-12 * max(np.abs(x[np.isfinite(x)]).max(initial=0) for x in terms)
    for ours, want in pairs:
        np.testing.assert_allclose(ours, want, rtol=1e-11, atol=atol)


def test_the_output_of_a_hidden_nan_is_finite():
    case = next(c for c in CATALOG["attention"].cases if c.name == HIDDEN_NAN)
    inputs, options, dys, _ = drawn(CATALOG["attention"], case)
    assert np.isnan(inputs["k"]).any()
    (o,), gradients = evaluate(CATALOG["attention"], inputs, options, dys)
    assert all(np.isfinite(x).all() for x in (o, *gradients))


def test_a_row_that_sees_a_nan_contains_one():
    q, k, v = (np.ones((1, 1, 3, 4)) for _ in range(3))
    v[0, 0, 1, 2] = np.nan
    o, _ = reference.attention(q, k, v, causal=True)
    assert np.isnan(o[0, 0, 1]).any()
    assert np.isnan(o[0, 0, 2]).any()


def test_a_query_that_sees_nothing_ignores_its_nan():
    q, k, v, do = (np.ones((1, 1, n, 4)) for n in (4, 2, 2, 4))
    q[0, 0, 0] = do[0, 0, 1] = np.nan
    (o, lse), cache = reference.attention(q, k, v, causal=True, return_lse=True)
    assert (o[0, 0, :2] == 0).all()
    assert np.isneginf(lse[0, 0, :2]).all()
    dq, dk, dv = reference.attention_backward((do, np.ones((1, 1, 4))), cache)
    assert (dq[0, 0, :2] == 0).all()
    assert np.isfinite(dk).all()
    assert np.isfinite(dv).all()


def test_optional_inputs_have_no_gradient():
    y, cache = reference.linear(np.ones((2, 3)), np.ones((3, 4)))
    assert reference.linear_backward(np.ones_like(y), cache)[2] is None
    y, cache = reference.embedding(np.zeros((1, 2), int), np.ones((3, 4)))
    assert reference.embedding_backward(np.ones_like(y), cache)[1] is None


def test_embedding_takes_positions():
    wte, wpe = np.zeros((5, 2)), np.arange(8.0).reshape(4, 2)
    y, _ = reference.embedding(np.array([[1, 2]]), wte, wpe, positions=np.array([[3, 0]]))
    np.testing.assert_array_equal(y[0], wpe[[3, 0]])


def test_a_scalar_gradient_is_accepted_where_the_loss_is_a_scalar():
    loss, cache = reference.cross_entropy(np.eye(3), np.arange(3))
    (dlogits,) = reference.cross_entropy_backward(2.0, cache)
    (unit,) = reference.cross_entropy_backward(1.0, cache)
    assert loss.shape == ()
    np.testing.assert_array_equal(dlogits, 2 * unit)
