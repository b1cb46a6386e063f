"""Philox, dropout, residual norm, head and loss, optimiser and sampling against other sources."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
import triton
import triton.language as tl
from gaugeblock.reference import (
    _ffn,
    adam,
    adamw,
    clip_grad_norm,
    cross_entropy,
    dropout,
    embedding,
    ffn,
    ffn_backward,
    linear,
    linear_cross_entropy,
    sample,
)
from gaugeblock.reference._philox import keep_mask, philox, words
from gaugeblock.reference._rounding import Arithmetic, Rounded
from gaugeblock.reference._sample import cumulative, distribution, penalised
from gaugeblock.reference.catalog import CATALOG
from gaugeblock.reference.oracle import check
from gaugeblock.reference.oracle.budget import evaluate
from gaugeblock.reference.oracle.expectation import Expectation

from tests.proof.independent import warped

OPS = ("dropout", "residual_layer_norm", "linear_cross_entropy", "adamw", "adam", "sample")
ROWS = {name: CATALOG[name] for name in OPS}
accepts = CATALOG["sample"].accepts
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = ("float32", "float16", "bfloat16")


def points(*names):
    return [
        pytest.param(ROWS[name], case, id=f"{name}-{case.name}")
        for name in names
        for case in ROWS[name].select("full")
    ]


def drawn(op, case):
    """Inputs, options, output gradients."""
    rng = np.random.default_rng(list(case.name.encode()))
    inputs, options = op.draw(case, rng), op.options(case)
    outputs, _ = evaluate(op, inputs, options, None)
    return inputs, options, tuple(rng.standard_normal(np.shape(y)) for y in outputs), rng


# Philox


ONES = 0xFFFFFFFF
PI = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0)


# Source: Random123 1.14.0, tests/kat_vectors
@pytest.mark.parametrize(
    ("rounds", "counter", "key", "want"),
    [
        (7, (0,) * 4, (0,) * 2, "5f6fb709 0d893f64 4f121f81 4f730a48"),
        (7, (ONES,) * 4, (ONES,) * 2, "5207ddc2 45165e59 4d8ee751 8c52f662"),
        (7, *PI, "4dfccaba 190a87f0 c47362ba b6b5242a"),
        (10, (0,) * 4, (0,) * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        (10, (ONES,) * 4, (ONES,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (10, *PI, "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_gives_the_published_vectors(rounds, counter, key, want):
    got = philox(counter, key, rounds)
    assert all(word.dtype == np.uint32 for word in got)
    assert " ".join(f"{int(word):08x}" for word in got) == want


@triton.jit
def _words_kernel(index_ptr, word_ptr, seed, N: tl.constexpr):
    offs = tl.arange(0, N)
    word, _, _, _ = tl.randint4x(seed, tl.load(index_ptr + offs))
    tl.store(word_ptr + offs, word.to(tl.int32, bitcast=True))


@pytest.mark.parametrize("seed", [0, 1, -1, -5, 2**32 - 1, 2**40 + 7, 2**63 - 1, -(2**63)])
def test_words_equal_tritons(seed):
    index = np.array([0, 1, 2**32 - 1, 2**32, 2**32 + 5, 2**40 + 3, 2**62 + 11, 2**63 - 1])
    got = torch.zeros(8, dtype=torch.int32, device=DEVICE)
    _words_kernel[(1,)](torch.from_numpy(index).to(DEVICE), got, seed, 8)
    np.testing.assert_array_equal(words(index, seed), got.cpu().numpy().view(np.uint32))


def test_the_high_halves_of_counter_and_key_count():
    index = np.arange(8)
    first = words(index, 7)
    for other in (words(index + 2**32, 7), words(index, 7 + 2**32), words(index, -7)):
        assert (first != other).all()
    np.testing.assert_array_equal(words(index, -7), words(index, 2**64 - 7))


# dropout


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9])
def test_the_share_that_is_kept_is_binomial(p):
    n = 200_000
    kept = keep_mask((n,), p, 3).sum()
    assert abs(kept - n * (1 - p)) <= 5 * math.sqrt(n * p * (1 - p))


# adamw


@pytest.mark.parametrize(
    "change",
    [
        {},
        dict(weight_decay=0.0),
        dict(weight_decay=2.0),
        dict(eps=0.5),
        dict(beta1=0.0),
        dict(beta1=0.99, beta2=0.999),
        dict(lr=6e-4),
    ],
    ids=str,
)
def test_ten_steps_equal_torchs(change):
    options = dict(lr=0.05, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1) | change
    rng = np.random.default_rng(0)
    p = rng.standard_normal((7, 33))
    m, v = np.zeros_like(p), np.zeros_like(p)
    theirs = torch.nn.Parameter(torch.from_numpy(p.copy()))
    optimiser = torch.optim.AdamW(
        [theirs],
        lr=options["lr"],
        betas=(options["beta1"], options["beta2"]),
        eps=options["eps"],
        weight_decay=options["weight_decay"],
        foreach=False,
    )
    for step in range(1, 11):
        g = rng.standard_normal(p.shape)
        (p, m, v), none = adamw(p, g, m, v, step, **options)
        assert none is None
        theirs.grad = torch.from_numpy(g)
        optimiser.step()
        state = optimiser.state[theirs]
        wants = theirs.detach(), state["exp_avg"], state["exp_avg_sq"]
        for ours, want in zip((p, m, v), wants):
            # the terms that are added are of the size of the largest element
            want = want.numpy()
            np.testing.assert_allclose(ours, want, rtol=1e-14, atol=1e-14 * np.abs(want).max())


# adam


def openai_adam(p, g, m, v, t, lr, b1, b2, e, l2):
    """A step as in finetune-transformer-lm's opt.py, whose t counts from 0, in torch."""
    tt = t + 1
    lrt = lr * math.sqrt(1 - b2**tt) / (1 - b1**tt)
    mt = b1 * m + (1 - b1) * g
    vt = b2 * v + (1 - b2) * g * g
    return p - lrt * (mt / (torch.sqrt(vt) + e) + l2 * p), mt, vt


@pytest.mark.parametrize(
    "change", [{}, dict(weight_decay=0.0), dict(eps=0.5), dict(beta1=0.0, beta2=0.9)], ids=str
)
def test_ten_steps_equal_openais(change):
    usual = dict(lr=0.05, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.01)
    options, rng = usual | change, np.random.default_rng(0)
    p = rng.standard_normal((7, 33))
    m, v = np.zeros_like(p), np.zeros_like(p)
    theirs = tuple(torch.from_numpy(x.copy()) for x in (p, m, v))
    for step in range(1, 11):
        g = rng.standard_normal(p.shape)
        (p, m, v), none = adam(p, g, m, v, step, **options)
        assert none is None
        theirs = openai_adam(
            theirs[0], torch.from_numpy(g), *theirs[1:], step - 1, *options.values()
        )
        for ours, want in zip((p, m, v), theirs):
            want = want.numpy()
            # the terms that are added are of the size of the largest element
            np.testing.assert_allclose(ours, want, rtol=1e-14, atol=1e-14 * np.abs(want).max())


@pytest.mark.parametrize("eps", [0.0, 1e-8])
def test_without_epsilon_and_decay_both_adams_are_one(eps):
    """Where ε is nothing beside the root, where it stands says nothing."""
    rng = np.random.default_rng(0)
    p, g, m = rng.standard_normal((3, 5, 7))
    arguments = (p, g, m, m * m, 7, 0.1, 0.9, 0.99, eps, 0.0)
    for a, b in zip(adam(*arguments)[0], adamw(*arguments)[0]):
        # ε weighs up to 1/√(1 − β₂ᵗ) = 4 times as much, beside roots of 0.1 and more
        np.testing.assert_allclose(a, b, rtol=1e-13 + 100 * eps)


# sample


def brute_force(
    logits, u, temperature=1.0, top_k=None, top_p=None, min_p=None, repetition_penalty=1.0,
    previous=(),
):  # fmt: skip
    """One row, token by token."""
    logits = list(logits)
    for i in {*map(int, previous)} - {-1}:
        factor = 1 / repetition_penalty if logits[i] > 0 else repetition_penalty
        logits[i] *= factor
    if temperature == 0:
        return list(logits).index(max(logits))
    s = [x / temperature for x in logits]
    kept = [i for i in range(len(s)) if s[i] > -math.inf]

    def probabilities():
        largest = max(s[i] for i in kept)
        e = {i: math.exp(s[i] - largest) for i in kept}
        total = math.fsum(e.values())
        return {i: x / total for i, x in e.items()}

    if top_k is not None:
        kth = sorted((s[i] for i in kept), reverse=True)[:top_k][-1]
        kept = [i for i in kept if s[i] >= kth]
    if top_p is not None and top_p < 1:
        p, chosen, mass = probabilities(), [], 0.0
        # the most probable first, of equals the higher index
        for i in sorted(kept, key=lambda i: (p[i], i), reverse=True):
            if mass < top_p:
                chosen.append(i)
            mass = math.fsum(p[j] for j in chosen)
        kept = sorted(chosen)
    if min_p is not None:
        p = probabilities()
        kept = [i for i in kept if p[i] >= min_p * max(p.values())]
    p = probabilities()
    for n, i in enumerate(kept):
        if math.fsum(p[j] for j in kept[: n + 1]) > u:
            return i
    return kept[-1]


@pytest.mark.parametrize(("op", "case"), points("sample"))
def test_sample_equals_a_loop_over_rows(op, case):
    inputs, options, _, _ = drawn(op, case)
    token, none = sample(**inputs, **options)
    assert none is None
    assert token.dtype == np.int64
    want = [
        brute_force(**{name: x[i] for name, x in inputs.items()}, **options)
        for i in range(len(token))
    ]
    np.testing.assert_array_equal(token, want)


def kept_by_hugging_face(logits, **options):
    return np.isfinite(warped(torch.from_numpy(logits), **options).numpy())


KEPT = [
    p
    for p in points("sample")
    if p.values[1].settings.get("temperature") != 0.0 and not p.values[1].keywords
]


@pytest.mark.parametrize("penalty", [1.3, 0.5, 1.0])
def test_the_penalty_is_hugging_faces(penalty):
    rng = np.random.default_rng(0)
    logits, previous = rng.standard_normal((5, 20)), rng.integers(0, 20, (5, 30))
    logits[:, 3], logits[:, 4] = 0, -np.inf
    theirs = transformers.RepetitionPenaltyLogitsProcessor(penalty)(
        torch.from_numpy(previous), torch.from_numpy(logits.copy())
    )
    # a product and a quotient: nothing is rounded twice
    np.testing.assert_array_equal(penalised(logits, penalty, previous), theirs.numpy())
    padded = np.concatenate([previous, np.full((5, 3), -1)], 1)
    np.testing.assert_array_equal(penalised(logits, penalty, padded), theirs.numpy())


@pytest.mark.parametrize(("op", "case"), KEPT)
def test_the_filters_keep_what_hugging_face_keeps(op, case):
    inputs, options, _, _ = drawn(op, case)
    logits = inputs["logits"]
    kept, theirs = cumulative(logits, **options)[0], kept_by_hugging_face(logits, **options)
    if "equals" in case.name:
        # which of the equals stay is up to torch's sort: compare what they are
        kept, theirs = (np.sort(np.where(x, logits, -np.inf), -1) for x in (kept, theirs))
    np.testing.assert_array_equal(kept, theirs)


@pytest.mark.parametrize("options", [
    dict(top_k=3), dict(top_k=1), dict(top_p=0.47), dict(top_p=0.21), dict(min_p=0.45),
    dict(top_k=6, top_p=0.57), dict(top_p=0.57, min_p=0.55),
], ids=str)  # fmt: skip
def test_equals_at_the_edge_are_kept_as_hugging_face_keeps_them(options):
    # rows short enough for torch's sort to leave equals in their order
    logits = np.log(np.random.default_rng(0).integers(1, 4, (50, 16)).astype(float))
    kept, _ = cumulative(logits, **options)
    np.testing.assert_array_equal(kept, kept_by_hugging_face(logits, **options))


def test_the_distribution_ends_at_1_and_every_token_is_hit():
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((4, 30))
    kept, cdf = cumulative(logits, top_k=7)
    assert (cdf[:, -1] == 1).all()
    assert (kept.sum(-1) == 7).all()
    u = (np.arange(20_000) + 0.5) / 20_000
    drawn_tokens = sample(np.broadcast_to(logits[:, None], (4, 20_000, 30)), np.tile(u, (4, 1)),
                          top_k=7)[0]  # fmt: skip
    for row in range(4):
        share = np.bincount(drawn_tokens[row], minlength=30) / 20_000
        np.testing.assert_allclose(share, np.diff(cdf[row], prepend=0), atol=1 / 20_000)
        np.testing.assert_array_equal(share > 0, kept[row])


def test_the_most_probable_token_stays_however_small_top_p_is():
    kept, cdf = cumulative(np.array([0.3, 2.0, -1.0]), top_p=1e-30)
    np.testing.assert_array_equal(kept, [False, True, False])
    np.testing.assert_array_equal(cdf, [0, 1, 1])


def test_leading_dimensions_are_free():
    rng = np.random.default_rng(0)
    logits, u = rng.standard_normal((2, 3, 9)), rng.random((2, 3))
    token, _ = sample(logits, u)
    np.testing.assert_array_equal(token.ravel(), sample(logits.reshape(6, 9), u.ravel())[0])
    assert sample(logits[0, 0], u[0, 0])[0] == token[0, 0]


RUNS = [
    Arithmetic(np.dtype(np.float32), chunk=chunk, unit=unit, roads=roads, noise=False).array
    for chunk, unit, roads in ((0, 1.0, False), (16, 1.3, True), (1, 1.7, False))
]


@pytest.mark.parametrize(("op", "case"), points("sample"))
def test_the_cumulative_works_under_legal_arithmetics(op, case):
    inputs, options, _, _ = drawn(op, case)
    penalty = options.pop("repetition_penalty", 1.0), inputs.get("previous")
    logits = penalised(inputs["logits"], *penalty)
    exact, _ = cumulative(logits, **options)
    for run in RUNS:
        kept, cdf = cumulative(penalised(run(inputs["logits"]), *penalty), **options)
        assert kept.dtype == bool
        assert cdf.dtype == np.float32
        assert (cdf[..., -1] == 1).all()
        if "equals" not in case.name:
            np.testing.assert_array_equal(kept, exact)
        # V roundings of sums that are at most 1, and of exp at arguments of a few hundred
        error = np.abs(np.asarray(cdf, float) - distribution(
            logits / (options.get("temperature", 1.0) or 1.0), np.asarray(kept)
        ))  # fmt: skip
        room = (logits.shape[-1] + 2000) * np.finfo(np.float32).eps
        assert error.max(initial=0) <= room


@pytest.mark.parametrize(("op", "case"), points("sample"))
def test_the_oracle_accepts_the_reference_and_no_other_token(op, case):
    inputs, options, _, _ = drawn(op, case)
    token, _ = sample(**inputs, **options)
    assert accepts(token, inputs, options, RUNS).all()
    V = inputs["logits"].shape[-1]
    if "degenerate" in case.tags:
        return
    for wrong in ((token + 1) % V, (token - 1) % V, token * 0 - 1, token * 0 + V):
        assert not accepts(wrong, inputs, options, RUNS).all()


def test_what_is_no_token_is_not_accepted():
    inputs = dict(logits=np.zeros((1, 4)), u=np.array([0.1]))
    assert accepts(np.array([0.0]), inputs, {}, RUNS).all()
    for wrong in (-1, 4, 0.5, math.nan):
        assert not accepts(np.array([wrong]), inputs, {}, RUNS).any()


def test_either_side_of_a_filters_threshold_is_accepted():
    p = np.array([[0.4, 0.3, 0.2, 0.1]])
    u = np.array([0.95])

    def right(**options):
        inputs = dict(logits=np.log(p), u=u)
        return [i for i in range(4) if accepts(np.array([i]), inputs, options, RUNS).all()]

    # 0.4 + 0.3 is 0.7 within a rounding, and 0.2 is half of 0.4
    assert right(top_p=0.7) == [1, 2]
    assert right(min_p=0.5) == [1, 2]
    assert right(top_p=0.69) == [1]
    assert right(min_p=0.51) == [1]


def test_equals_at_the_edge_of_top_p_may_be_chosen_in_any_way():
    rng = np.random.default_rng(0)
    logits = np.log(rng.integers(1, 4, 9) / 20.0)
    options, runs = dict(top_p=0.55), RUNS
    kept, _ = cumulative(logits, **options)
    equal = np.flatnonzero(logits == logits[kept].min())
    chosen = int(kept[equal].sum())
    assert 0 < chosen < len(equal)
    sets = [kept | (logits == logits[equal[0]])]
    for some in itertools.combinations(equal, chosen):
        sets.append(kept & (logits > logits[equal[0]]) | np.isin(np.arange(9), some))
    for u in rng.random(200):
        right = {int((distribution(logits, s) > u).argmax()) for s in sets}
        inputs = dict(logits=logits[None], u=np.array([u]))
        accepted = {i for i in range(9) if accepts(np.array([i]), inputs, options, runs).all()}
        assert accepted == right


@pytest.mark.parametrize("roads", [False, True])
def test_arithmetic_in_place_is_that_of_new_arrays(roads):
    a, b = np.random.default_rng(0).standard_normal((2, 50)).astype(np.float32)
    results = []
    for in_place in (False, True):
        x, y = map(Arithmetic(np.dtype(np.float16), chunk=4, roads=roads).array, (a.copy(), b))
        if in_place:
            x *= y
            np.exp(x, out=x)
            x += y
        else:
            x = np.exp(x * y) + y
        assert isinstance(x, Rounded)
        assert x.arithmetic is y.arithmetic
        results.append(np.asarray(x))
    np.testing.assert_array_equal(*results)
    # and it is not plain float32's
    assert (results[0] != np.exp(a * b) + b).any()


@pytest.mark.parametrize("rows", [1, 3, 40])
def test_an_ffn_of_many_hidden_units_is_that_of_its_rows(rows, monkeypatch):
    rng = np.random.default_rng(0)
    shapes = (rows, 2), (2, 7), 7, (7, 2), 2
    inputs, dy = [rng.standard_normal(shape) for shape in shapes], rng.standard_normal((rows, 2))
    y, cache = ffn(*inputs)
    dx, *_ = ffn_backward(dy, cache)
    # 7 units of 40 rows are 23 pieces, the last of 4 units
    monkeypatch.setattr(_ffn, "_PIECE", 12)
    pieces, cache = ffn(*inputs)
    np.testing.assert_array_equal(pieces, y)
    np.testing.assert_array_equal(ffn_backward(dy, cache)[0], dx)


# errors


@pytest.mark.parametrize(
    ("call", "raises", "message"),
    [
        (lambda: dropout(np.ones(3), 0.5, "x"), TypeError, "dropout: seed must be an integer"),
        (lambda: dropout(np.ones(3), 0.5, -(2**63) - 1), ValueError, "dropout: seed must lie in"),
        (lambda: sample(np.ones((2, 3)), np.array([0.5, np.nan])), ValueError, "u must lie in"),
        (lambda: sample(np.ones(3), 0.5, temperature=math.nan), ValueError, "temperature must be"),
        (lambda: sample(np.ones(3), 0.5, temperature=math.inf), ValueError, "temperature must be"),
        (lambda: cumulative(np.ones(3), top_p=math.nan), ValueError, "top_p must lie in"),
        (lambda: cumulative(np.ones(3), min_p=-0.1), ValueError, "min_p must lie in"),
        (lambda: penalised(np.ones(3), math.nan, [0]), ValueError, "repetition_penalty must be"),
        (lambda: penalised(np.ones(3), 1.5, [3]), ValueError, "previous must lie in 0 … V − 1 = 2"),
        (lambda: penalised(np.ones(3), 1.5, [-2]), ValueError, "previous must lie in 0 … V − 1"),
        (lambda: penalised(np.ones(3), 1.5, [0.5]), TypeError, "previous must be integers"),
        (lambda: linear(1.0, np.eye(2)), ValueError, "linear: x must have shape"),
        (lambda: ffn(1.0, *4 * [np.eye(2)]), ValueError, "ffn: x must have shape"),
        (lambda: cross_entropy(1.0, 0), ValueError, "logits must have shape"),
        (lambda: linear_cross_entropy(1.0, np.eye(2), 0), ValueError, "x must have shape"),
        (lambda: embedding(1, np.eye(2), np.eye(2)), ValueError, "tokens must have shape"),
        (lambda: clip_grad_norm([], "1"), TypeError, "max_norm must be a number"),
    ],
)
def test_other_bad_values_are_refused(call, raises, message):
    with pytest.raises(raises, match=message):
        call()


# the oracle: legal implementations in torch pass, and each way to be wrong is named


def wide(x):
    return x if x.dtype == torch.float64 else x.float()


def torch_keep_mask(shape, p, seed):
    """Philox in int64, whose products wrap; halves are taken with a mask."""
    low = 0xFFFFFFFF
    i = torch.arange(math.prod(shape)).reshape(shape)
    c = [i & low, i >> 32, torch.zeros_like(i), torch.zeros_like(i)]
    k0, k1 = seed & low, (seed >> 32) & low
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [((b >> 32) & low) ^ c[1] ^ k0, b & low, ((a >> 32) & low) ^ c[3] ^ k1, a & low]
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return c[0] >= math.floor(p * 2**32)


def eager_dropout(x, p, seed):
    kept = torch_keep_mask(tuple(x.shape), p, seed)
    return torch.where(kept, wide(x) / (1 - p or 1), 0.0).to(x.dtype)


def dropout_in_float32(x, p, seed):
    """p and 1/(1 − p) in float32, as in a kernel that takes p as a scalar."""
    keep = 1 - torch.tensor(p, dtype=torch.float32)
    scale = torch.where(keep == 0, 0.0, 1 / keep)
    return (x.float() * torch_keep_mask(tuple(x.shape), p, seed) * scale).to(x.dtype)


def eager_residual_layer_norm(x, r, w, b, eps=1e-5):
    h = wide(x) + wide(r)
    centred = h - h.mean(-1, keepdim=True)
    y = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps) * wide(w) + wide(b)
    return y.to(x.dtype), h.to(x.dtype)


class NormOfWrittenSum(torch.autograd.Function):
    """The backward reads the h that the forward wrote."""

    @staticmethod
    def forward(ctx, x, r, w, b, eps):
        h = x.float() + r.float()
        mean = h.mean(-1, keepdim=True)
        rstd = torch.rsqrt((h - mean).square().mean(-1, keepdim=True) + eps)
        y = (h - mean) * rstd * w.float() + b.float()
        ctx.save_for_backward(h.to(x.dtype), mean, rstd, w)
        return y.to(x.dtype), h.to(x.dtype)

    @staticmethod
    def backward(ctx, dy, dh):
        h, mean, rstd, w = ctx.saved_tensors
        hhat, g = (h.float() - mean) * rstd, dy.float() * w.float()
        dx = g - g.mean(-1, keepdim=True) - hhat * (g * hhat).mean(-1, keepdim=True)
        dx = (rstd * dx + dh.float()).to(h.dtype)
        dw, db = (dy.float() * hhat).sum(0).to(w.dtype), dy.float().sum(0).to(w.dtype)
        return dx, dx, dw, db, None


def residual_layer_norm_written(x, r, w, b, eps=1e-5):
    return NormOfWrittenSum.apply(x, r, w, b, eps)


def eager_linear_cross_entropy(x, w, targets, b=None, **options):
    logits = F.linear(wide(x), wide(w), None if b is None else wide(b))
    return F.cross_entropy(logits, targets, **options)


def stored_dlogits(x, w, targets, b=None, **options):
    logits = F.linear(x.float(), w.float(), None if b is None else b.float())
    if logits.requires_grad:
        logits.register_hook(lambda g: g.to(x.dtype).float())
    return F.cross_entropy(logits, targets, **options)


def eager_adamw(p, g, m, v, step, lr, beta1, beta2, eps, weight_decay):
    """In place."""
    p32, g32, m32, v32 = map(wide, (p, g, m, v))
    m32 = beta1 * m32 + (1 - beta1) * g32
    v32 = beta2 * v32 + (1 - beta2) * g32 * g32
    root = v32.sqrt() / math.sqrt(1 - beta2**step)
    p.copy_(p32 * (1 - lr * weight_decay) - lr / (1 - beta1**step) * m32 / (root + eps))
    m.copy_(m32)
    v.copy_(v32)


def eager_adam(p, g, m, v, step, lr, beta1, beta2, eps, weight_decay=0.0):
    """In place, and a power for a root."""
    p32, g32, m32, v32 = map(wide, (p, g, m, v))
    m32 = m32.lerp(g32, 1 - beta1)
    v32 = beta2 * v32 + (1 - beta2) * g32 * g32
    rate = lr * math.sqrt(1 - beta2**step) / (1 - beta1**step)
    p.copy_(p32 * (1 - rate * weight_decay) - rate * m32 / (v32**0.5 + eps))
    m.copy_(m32)
    v.copy_(v32)


def adamw_in_float32(p, g, m, v, step, lr, beta1, beta2, eps, weight_decay):
    """All scalars, and 1 − βᵗ, in float32; the first moment by interpolation; new tensors."""
    lr, beta1, beta2, eps, weight_decay = (
        torch.tensor(s, dtype=torch.float32) for s in (lr, beta1, beta2, eps, weight_decay)
    )
    p32, g32, m32, v32 = (x.float() for x in (p, g, m, v))
    m32 = m32 + (g32 - m32) * (1 - beta1)
    v32 = beta2 * v32 + (1 - beta2) * g32 * g32
    root = (v32 / (1 - beta2**step)).sqrt()
    p32 = p32 - lr * weight_decay * p32
    p32 = p32 - lr * (m32 / (1 - beta1**step)) / (root + eps)
    return p32.to(p.dtype), m32.to(p.dtype), v32.to(p.dtype)


def eager_sample(
    logits, u, temperature=1.0, top_k=None, top_p=None, min_p=None, *, repetition_penalty=1.0,
    previous=None,
):  # fmt: skip
    if previous is not None:
        logits = wide(logits)
        rows, columns = (previous >= 0).nonzero(as_tuple=True)
        seen = torch.zeros(logits.shape, dtype=torch.bool)
        seen[rows, previous[rows, columns]] = True
        less = torch.where(logits < 0, logits * repetition_penalty, logits / repetition_penalty)
        logits = torch.where(seen, less, logits)
    if temperature == 0:
        return (logits == logits.amax(-1, keepdim=True)).int().argmax(-1)
    s = wide(logits) / temperature
    V = s.shape[-1]
    if top_k is not None:
        s = s.masked_fill(s < s.topk(min(top_k, V)).values[..., -1:], -math.inf)
    if top_p is not None and top_p < 1:
        ranked, order = s.sort(dim=-1, descending=True, stable=True)
        p = ranked.softmax(-1)
        gone = p.cumsum(-1) - p >= top_p
        gone[..., 0] = False
        s = s.masked_fill(torch.zeros_like(gone).scatter(-1, order, gone), -math.inf)
    if min_p is not None:
        p = s.softmax(-1)
        s = s.masked_fill(p < min_p * p.amax(-1, keepdim=True), -math.inf)
    p = s.softmax(-1)
    cdf = p.cumsum(-1)
    hit = (cdf > wide(u)[..., None] * cdf[..., -1:]) & (p > 0)
    last = V - 1 - (p > 0).flip(-1).int().argmax(-1)
    return torch.where(hit.any(-1), hit.int().argmax(-1), last)


def layouts_of(op):
    """What is updated in place cannot have strides of 0."""
    return ("contiguous", "transposed", "sliced", "offset") if op.updates else None


LEGAL = {
    "dropout": [eager_dropout, dropout_in_float32],
    "residual_layer_norm": [eager_residual_layer_norm, residual_layer_norm_written],
    "linear_cross_entropy": [eager_linear_cross_entropy, stored_dlogits],
    "adamw": [eager_adamw, adamw_in_float32],
    "adam": [eager_adam],
    "sample": [eager_sample],
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("op", "fn"),
    [pytest.param(op, fn, id=fn.__name__) for op, fns in LEGAL.items() for fn in fns],
)
def test_a_legal_implementation_passes(op, fn, dtype):
    report = check(ROWS[op], fn, dtypes=(dtype,), cases="full", layouts=("contiguous", "sliced"))
    assert report.passed, report.failures[:3]
    cases = ROWS[op].select("full")
    checked = {c.name for c in cases if not Expectation(ROWS[op], c, dtype).vanishes()}
    assert {r.case for r in report.results} == checked
    assert len(cases) - len(checked) <= 1


def wrong_seed_half(x, p, seed):
    return eager_dropout(x, p, seed & 0xFFFFFFFF)


def wrong_one_seed(x, p, seed):
    return eager_dropout(x, p, 0)


def wrong_unscaled(x, p, seed):
    return torch.where(torch_keep_mask(tuple(x.shape), p, seed), x, 0.0)


def wrong_complement(x, p, seed):
    kept = ~torch_keep_mask(tuple(x.shape), p, seed)
    return torch.where(kept, wide(x) / max(1 - p, 1e-6), 0.0).to(x.dtype)


def wrong_backward_mask(x, p, seed):
    y = eager_dropout(x, p, seed)
    return y.detach() + (x - x.detach()) / max(1 - p, 1e-6)


def wrong_rounded_h(x, r, w, b, eps=1e-5):
    h = (wide(x) + wide(r)).to(x.dtype)
    return eager_residual_layer_norm(h, torch.zeros_like(h), w, b, eps)


def wrong_lost_dh(x, r, w, b, eps=1e-5):
    y, h = eager_residual_layer_norm(x, r, w, b, eps)
    return y, h.detach()


def wrong_one_summand_has_no_gradient(x, r, w, b, eps=1e-5):
    return eager_residual_layer_norm(x, r.detach(), w, b, eps)


def wrong_order(x, r, w, b, eps=1e-5):
    y, _ = eager_residual_layer_norm(x, torch.zeros_like(r), w, b, eps)
    return (wide(y) + wide(r)).to(x.dtype), (wide(x) + wide(r)).to(x.dtype)


def wrong_low_precision_logits(x, w, targets, b=None, **options):
    logits = F.linear(wide(x), wide(w), None if b is None else wide(b)).bfloat16().float()
    return F.cross_entropy(logits, targets, **options)


def wrong_bias_ignored(x, w, targets, b=None, **options):
    return eager_linear_cross_entropy(x, w, targets, **options)


def wrong_mean_of_all(x, w, targets, b=None, reduction="mean", **options):
    losses = eager_linear_cross_entropy(x, w, targets, b, reduction="none", **options)
    return {"none": losses, "sum": losses.sum(), "mean": losses.mean()}[reduction]


def wrong_ignore_index(x, w, targets, b=None, ignore_index=-100, **options):
    targets = torch.where(targets == -100, 0, targets)
    return eager_linear_cross_entropy(x, w, targets, b, **options)


def wrong_no_maximum(x, w, targets, b=None, **options):
    logits = F.linear(wide(x), wide(w), None if b is None else wide(b))
    lse = logits.exp().sum(-1)
    shifted = logits - lse.log()[:, None]
    return F.cross_entropy(shifted, targets, **options)


def wrong_adamw(change):
    """A step in float32 with one thing changed."""

    def fn(p, g, m, v, step, lr, beta1, beta2, eps, weight_decay):
        p32, g32, m32, v32 = map(wide, (p, g, m, v))
        if change == "l2":
            g32 = g32 + weight_decay * p32
        m32 = beta1 * m32 + (1 - beta1) * g32
        v32 = beta2 * v32 + (1 - beta2) * g32 * g32
        t = step - 1 if change == "step_from_0" else step
        c1, c2 = (1.0, 1.0) if change == "uncorrected" else (1 - beta1**t, 1 - beta2**t)
        if change == "uncorrected_v":
            c2 = 1.0
        vhat = v32 / max(c2, 1e-9)
        root = (vhat + eps).sqrt() if change == "eps_inside" else vhat.sqrt() + eps
        update = lr * m32 / max(c1, 1e-9) / root
        decay = 1 if change == "l2" else 1 - lr * weight_decay
        p32 = (p32 - update) * decay if change == "decay_last" else p32 * decay - update
        p.copy_(p32)
        if change != "moments_kept":
            m.copy_(m32)
            v.copy_(v32)

    fn.__name__ = f"wrong_{change}"
    return fn


def wrong_adam(change):
    """A step of Adam with one thing changed."""

    def fn(p, g, m, v, step, lr, beta1, beta2, eps, weight_decay=0.0):
        p32, g32, m32, v32 = map(wide, (p, g, m, v))
        if change == "l2":
            g32 = g32 + weight_decay * p32
        m32 = beta1 * m32 + (1 - beta1) * g32
        v32 = beta2 * v32 + (1 - beta2) * g32 * g32
        c1, c2 = 1 - beta1**step, math.sqrt(1 - beta2**step)
        if change == "uncorrected":
            c1 = c2 = 1.0
        rate = lr * (1 / c1 if change == "uncorrected_v" else c2 / c1)
        root = v32.sqrt() + (eps * c2 if change == "eps_beside_the_corrected_root" else eps)
        if change == "eps_inside":
            root = (v32 + eps).sqrt()
        decay = {"l2": 0, "decay_at_the_whole_rate": lr / rate if rate else 0}.get(change, 1)
        p.copy_(p32 - rate * (m32 / root + decay * weight_decay * p32))
        m.copy_(m32)
        v.copy_(v32)

    fn.__name__ = f"wrong_adam_{change}"
    return fn


def wrong_sample(change):
    """A sampler with one thing changed."""

    def fn(
        logits, u, temperature=1.0, top_k=None, top_p=None, min_p=None, *, repetition_penalty=1.0,
        previous=None,
    ):  # fmt: skip
        if previous is not None:
            return penalty(
                logits, u, temperature, top_k, top_p, min_p, repetition_penalty, previous
            )
        if change == "greedy_last" and temperature == 0:
            V = logits.shape[-1]
            best = (logits == logits.amax(-1, keepdim=True)).flip(-1).int().argmax(-1)
            return V - 1 - best
        if change == "always_greedy":
            return logits.argmax(-1)
        if change == "temperature_ignored" and temperature:
            temperature = 1.0
        if change == "one_fewer_in_top_k" and top_k is not None:
            top_k = max(top_k - 1, 1)
        if change == "exactly_k" and top_k is not None:
            best = logits.topk(min(top_k, logits.shape[-1])).indices
            logits = torch.full_like(logits, -math.inf).scatter(-1, best, logits.gather(-1, best))
        if change == "top_p_without_the_last" and top_p is not None and top_p < 1:
            ranked, order = (wide(logits) / temperature).sort(-1, descending=True)
            gone = ranked.softmax(-1).cumsum(-1) > top_p
            gone[..., 0] = False
            gone = torch.zeros_like(gone).scatter(-1, order, gone)
            logits, top_p = logits.masked_fill(gone, -math.inf), None
        if change == "min_p_of_1" and min_p is not None:
            gone = (wide(logits) / temperature).softmax(-1) < min_p
            gone &= logits < logits.amax(-1, keepdim=True)
            logits, min_p = logits.masked_fill(gone, -math.inf), None
        if change == "not_renormalised" and top_k is not None:
            cdf = (wide(logits) / temperature).softmax(-1).cumsum(-1)
            return (cdf > wide(u)[..., None]).int().argmax(-1)
        if change == "reversed_u":
            u = (1 - 2**-8) - u
        return eager_sample(logits, u, temperature, top_k, top_p, min_p)

    def penalty(logits, u, temperature, top_k, top_p, min_p, factor, previous):
        if change == "penalty_ignored":
            factor = 1.0
        if change == "penalty_divides_all":
            seen = torch.zeros(logits.shape).scatter_add_(
                -1, previous.clamp_min(0), (previous >= 0).float()
            )
            return eager_sample(
                torch.where(seen > 0, wide(logits) / factor, wide(logits)), u, temperature, top_k,
                top_p, min_p,
            )  # fmt: skip
        if change == "penalty_takes_padding_for_token_0":
            previous = previous.clamp_min(0)
        if change == "penalty_adds_up":
            for column in previous.mT[:-1]:
                logits = once(logits, factor, column[:, None])
            previous = previous[:, -1:]
        return eager_sample(
            logits, u, temperature, top_k, top_p, min_p, repetition_penalty=factor,
            previous=previous,
        )  # fmt: skip

    def once(logits, factor, column):
        x = wide(logits).gather(-1, column.clamp_min(0))
        less = torch.where(column < 0, x, torch.where(x < 0, x * factor, x / factor))
        return wide(logits).scatter(-1, column.clamp_min(0), less)

    fn.__name__ = f"wrong_{change}"
    return fn


WRONG = {
    "dropout": [
        wrong_seed_half, wrong_one_seed, wrong_unscaled, wrong_complement, wrong_backward_mask,
    ],
    "residual_layer_norm": [
        wrong_rounded_h, wrong_lost_dh, wrong_one_summand_has_no_gradient, wrong_order,
    ],
    "linear_cross_entropy": [
        wrong_low_precision_logits, wrong_bias_ignored, wrong_mean_of_all, wrong_ignore_index,
        wrong_no_maximum,
    ],
    "adamw": [
        wrong_adamw(change)
        for change in ("l2", "uncorrected", "uncorrected_v", "step_from_0", "eps_inside",
                       "decay_last", "moments_kept")
    ],
    "adam": [
        wrong_adam(change)
        for change in ("l2", "uncorrected", "uncorrected_v", "eps_beside_the_corrected_root",
                       "eps_inside", "decay_at_the_whole_rate")
    ],
    "sample": [
        wrong_sample(change)
        for change in ("greedy_last", "always_greedy", "temperature_ignored", "one_fewer_in_top_k",
                       "exactly_k", "top_p_without_the_last", "min_p_of_1", "not_renormalised",
                       "reversed_u", "penalty_ignored", "penalty_divides_all",
                       "penalty_takes_padding_for_token_0", "penalty_adds_up")
    ],
}  # fmt: skip
# a rounding to the storage dtype is none in float32
NOT_WRONG_IN = {"wrong_rounded_h": {"float32"}}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("op", "fn"),
    [pytest.param(op, fn, id=fn.__name__) for op, fns in WRONG.items() for fn in fns],
)
def test_a_wrong_implementation_is_named_wrong(op, fn, dtype):
    report = check(ROWS[op], fn, dtypes=(dtype,), layouts=("contiguous",), memory=False)
    assert report.passed == (dtype in NOT_WRONG_IN.get(fn.__name__, ()))
    kinds = {r.kind for r in report.failures}
    assert kinds <= {"row", "rms", "nonfinite", "choice"}, report.failures


@pytest.mark.parametrize("op", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("value", [0, 1])
def test_constants_fail_every_case_that_is_not_degenerate(op, value):
    def constant(*tensors, **options):
        like = [op.outputs[name] for name in op.outputs]
        inputs = dict(zip(op.inputs, tensors))
        shapes = [wanted(spec, inputs) for spec in like]
        kind = torch.int64 if op.accepts else torch.float32
        if options.get("reduction") == "none":
            shapes = [inputs["targets"].shape]
        return tuple(torch.full(shape, value, dtype=kind) for shape in shapes)

    def wanted(spec, inputs):
        sizes = {
            d: n
            for name, tensor in inputs.items()
            for d, n in zip(op.inputs[name].shape.split(), tensor.shape)
        }
        return tuple(sizes[d] for d in spec.split())

    for case in op.select("full"):
        if "degenerate" not in case.tags:
            report = check(
                op,
                constant,
                expression=case.name,
                cases="full",
                layouts=("contiguous",),
                memory=False,
            )
            assert not report.passed, case
