"""The rules of what each op means, one test each, named for its rule."""

import inspect
import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from gaugeblock.reference import (
    adam,
    adamw,
    additive_attention,
    additive_attention_backward,
    attention,
    attention_backward,
    cross_entropy,
    cross_entropy_backward,
    dropout,
    dropout_backward,
    embedding,
    ffn,
    ffn_backward,
    layer_norm,
    linear,
    linear_cross_entropy,
    linear_cross_entropy_backward,
    paged_attention,
    residual_layer_norm,
    sample,
)
from gaugeblock.reference._philox import keep_mask, philox, words
from gaugeblock.reference._rounding import Arithmetic
from gaugeblock.reference.catalog import CATALOG
from gaugeblock.reference.oracle.budget import evaluate

from gaugeblock import reference


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


# linear, embedding, norms


def test_linear_is_x_w_plus_b_with_w_in_out():
    x, w, b = normal(5, 3), normal(3, 4), normal(4)
    y, _ = linear(x, w, b)
    want = [[sum(x[i] * w[:, n]) + b[n] for n in range(4)] for i in range(5)]
    np.testing.assert_allclose(y, want, rtol=1e-14)


def test_positions_are_counted_in_every_row_unless_they_are_given():
    wte, wpe, tokens = normal(7, 4), normal(6, 4, seed=1), np.array([[2, 2, 0], [6, 1, 2]])
    y, _ = embedding(tokens, wte, wpe)
    np.testing.assert_array_equal(y, wte[tokens] + wpe[[0, 1, 2]])


def test_layer_norm_has_a_biased_variance_and_epsilon_inside_the_root():
    x, w, b = normal(3, 8), normal(8, seed=1), normal(8, seed=2)
    y, _ = layer_norm(x, w, b, eps=0.3)
    variance = ((x - x.mean(-1, keepdims=True)) ** 2).sum(-1, keepdims=True) / 8
    want = w * (x - x.mean(-1, keepdims=True)) / np.sqrt(variance + 0.3) + b
    np.testing.assert_allclose(y, want, rtol=1e-13)
    assert inspect.signature(layer_norm).parameters["eps"].default == 1e-5


def test_layer_norm_centres_twice_so_that_an_offset_costs_no_digits():
    # the mean of numbers near 2⁴⁰ is off by more than 10⁻⁵: seven of them have no exact mean
    x = 2.0**40 + np.array([0.0, 1, 3, 4, 8, 9, 2])
    exact = [Fraction(v) for v in x]
    mean = sum(exact) / 7
    variance = sum((v - mean) ** 2 for v in exact) / 7
    y, _ = layer_norm(x[None], np.ones(7), np.zeros(7), eps=0.0)
    want = [float(v - mean) / math.sqrt(variance) for v in exact]
    np.testing.assert_allclose(y[0], want, rtol=1e-14)


def test_the_residual_norm_normalises_the_unrounded_sum():
    arithmetic = Arithmetic(np.dtype(np.float16), noise=False)
    x, r = (arithmetic.array(normal(4, 8, seed=s).astype(np.float16)) for s in (0, 1))
    w, b = (arithmetic.array(normal(8, seed=s).astype(np.float16)) for s in (2, 3))
    (y, _), _ = residual_layer_norm(x, r, w, b)
    rounded = arithmetic.array((x + r).astype(np.float16))
    np.testing.assert_array_equal(y, layer_norm(x + r, w, b)[0])
    assert (np.asarray(y) != np.asarray(layer_norm(rounded, w, b)[0])).any()


# attention: who sees whom


def seen(Tq, Tk, H=1, B=1, **options):
    """(B, H, Tq, Tk) boolean: which keys have weight."""
    q, k = np.zeros((B, H, Tq, Tk)), np.zeros((B, H, Tk, Tk))
    v = np.broadcast_to(np.eye(Tk), k.shape)
    return attention(q, k, v, **options)[0] > 0


def mask(Tq, Tk, rule):
    return np.array([[bool(rule(i, j)) for j in range(Tk)] for i in range(Tq)])


def test_keys_at_and_past_the_length_are_masked():
    for b, n in enumerate((5, 2)):
        np.testing.assert_array_equal(
            seen(3, 5, B=2, lengths=(5, 2))[b, 0], mask(3, 5, lambda i, j, n=n: j < n)
        )


@pytest.mark.parametrize(("Tq", "Tk"), [(3, 7), (7, 3), (5, 5)])
def test_bottom_right_is_the_cache_meaning_and_top_left_counts_from_0(Tq, Tk):
    found = seen(Tq, Tk, causal=True)[0, 0]
    np.testing.assert_array_equal(found, mask(Tq, Tk, lambda i, j: j <= i + Tk - Tq))
    found = seen(Tq, Tk, causal=True, align="top_left")[0, 0]
    np.testing.assert_array_equal(found, mask(Tq, Tk, lambda i, j: j <= i))


def test_bottom_right_counts_from_the_length_of_the_row():
    found = seen(2, 6, B=2, causal=True, lengths=(6, 4))
    np.testing.assert_array_equal(found[0, 0], mask(2, 6, lambda i, j: j <= i + 4))
    np.testing.assert_array_equal(found[1, 0], mask(2, 6, lambda i, j: j <= i + 2))


def test_a_causal_window_keeps_w_keys_self_included():
    found = seen(9, 9, causal=True, window=3)[0, 0]
    np.testing.assert_array_equal(found, mask(9, 9, lambda i, j: i - 3 < j <= i))
    assert found.sum(1).max() == 3


def test_a_window_that_is_not_causal_keeps_both_sides():
    found = seen(9, 9, window=3)[0, 0]
    np.testing.assert_array_equal(found, mask(9, 9, lambda i, j: abs(i - j) < 3))


def test_global_tokens_are_exempt_from_the_window_and_not_from_causality():
    found = seen(9, 9, causal=True, window=2, global_tokens=3)[0, 0]
    rule = lambda i, j: j <= i and (j > i - 2 or j < 3)  # noqa: E731
    np.testing.assert_array_equal(found, mask(9, 9, rule))


def test_strided_keys_are_exempt_from_the_window_and_not_from_causality():
    found = seen(13, 13, causal=True, window=2, stride=4)[0, 0]
    rule = lambda i, j: j <= i and (j > i - 2 or (i - j) % 4 == 0)  # noqa: E731
    np.testing.assert_array_equal(found, mask(13, 13, rule))
    both = seen(13, 13, window=2, stride=4)[0, 0]
    np.testing.assert_array_equal(both, found | found.T)


def test_a_stride_counts_positions_as_the_window_does():
    found = seen(2, 12, B=2, causal=True, window=1, stride=4, lengths=(12, 7))
    for b, n in enumerate((12, 7)):
        rule = lambda i, j, n=n: j <= i + n - 2 and (i + n - 2 - j) % 4 == 0  # noqa: E731
        np.testing.assert_array_equal(found[b, 0], mask(2, 12, rule))


def test_a_stride_needs_a_window():
    with pytest.raises(ValueError, match=r"^attention: stride must come with a window"):
        seen(5, 5, stride=2)


@pytest.mark.parametrize(
    "options", [{}, dict(causal=True, window=2, stride=3, global_tokens=1)], ids=["full", "all"]
)
def test_documents_see_themselves_alone_and_count_from_their_start(options):
    starts = (0, 4, 4, 5, 12)
    found = seen(12, 12, cu_seqlens=starts, **options)[0, 0]
    want = np.zeros((12, 12), bool)
    for a, b in itertools.pairwise(starts):
        if b > a:
            want[a:b, a:b] = seen(b - a, b - a, **options)[0, 0]
    np.testing.assert_array_equal(found, want)


@pytest.mark.parametrize("starts", [(1, 6), (0, 5), (0, 7), (0, 4, 3, 6), (0,)])
def test_documents_run_from_0_to_T(starts):
    with pytest.raises(ValueError, match=r"^attention: cu_seqlens must rise from 0 to T = 6"):
        seen(6, 6, cu_seqlens=starts)


def test_documents_are_for_self_attention_alone():
    for Tq, B in ((5, 1), (6, 2)):
        with pytest.raises(ValueError, match=r"^attention: q must have shape"):
            seen(Tq, 6, B=B, cu_seqlens=(0, 6))


def test_there_must_be_a_key():
    with pytest.raises(ValueError, match=r"^attention: Tk must be at least 1, got 0"):
        seen(3, 0)


# attention: values


def test_a_query_head_reads_the_key_head_of_its_group():
    q, k, v = normal(2, 6, 5, 4), normal(2, 2, 7, 4, seed=1), normal(2, 2, 7, 4, seed=2)
    o, _ = attention(q, k, v)
    for h in range(6):
        alone, _ = attention(q[:, h : h + 1], k[:, h // 3][:, None], v[:, h // 3][:, None])
        np.testing.assert_allclose(o[:, h : h + 1], alone, rtol=1e-13)


def test_the_scale_is_the_inverse_root_of_D_and_may_be_0_or_negative():
    q, k, v = normal(3, 1, 1, 5, 4)
    np.testing.assert_array_equal(attention(q, k, v)[0], attention(q, k, v, scale=0.5)[0])
    zero = attention(q, k, v, scale=0.0)[0]
    np.testing.assert_allclose(zero[0, 0], np.tile(v[0, 0].mean(0), (5, 1)), rtol=1e-13)
    np.testing.assert_allclose(attention(q, k, v, scale=-0.3)[0], attention(q, -k, v, scale=0.3)[0])


def test_lse_is_the_natural_log_and_comes_beside_o():
    q, k, v = normal(3, 1, 1, 5, 4)
    (o, lse), cache = attention(q, k, v, return_lse=True)
    np.testing.assert_array_equal(o, attention(q, k, v)[0])
    np.testing.assert_allclose(lse[0, 0], np.log(np.exp(q[0, 0] @ k[0, 0].T / 2).sum(-1)))
    assert len(attention_backward((o, lse), cache)) == 3


def test_a_key_that_no_query_sees_changes_nothing():
    q, k, v, do = normal(4, 2, 2, 4, 4)
    k, v = (np.concatenate([x, normal(2, 2, 3, 4)], 2) for x in (k, v))
    options = dict(causal=True, align="top_left", score="cosine", temperature=np.array([0.3, 0.5]))
    o, cache = attention(q, k, v, **options)
    gradients = attention_backward(do, cache)
    for value in (np.nan, np.inf, 1e300):
        k[:, :, 4:] = v[:, :, 4:] = value
        same, cache = attention(q, k, v, **options)
        np.testing.assert_array_equal(o, same)
        for a, b in zip(gradients, attention_backward(do, cache)):
            np.testing.assert_array_equal(a, b)
    assert (gradients[1][:, :, 4:] == 0).all()
    assert (gradients[2][:, :, 4:] == 0).all()


def test_beside_a_nan_that_is_seen_its_key_head_alone_is_not_compared():
    q, k, v = normal(2, 4, 5, 3), normal(2, 2, 5, 3), normal(2, 2, 5, 3)
    k[1, 0, 2, 1] = np.nan
    skipped = CATALOG["attention"].unspecified(dict(q=q, k=k, v=v), dict(causal=True))
    # rows that see the NaN are compared: they must hold one
    rows = skipped["o"][..., 0]
    assert rows[1, :2, :2].all()
    assert not rows[1, :2, 2:].any()
    assert not rows[0].any()
    assert not rows[1, 2:].any()
    for name in ("dq", "dk", "dv"):
        share = 2 if name == "dq" else 1
        assert skipped[name][1, :share].all()
        assert not skipped[name][0].any()
        assert not skipped[name][1, share:].any()


def test_a_row_whose_visible_scores_are_all_minus_infinity_spoils_no_other():
    q, k, v = np.ones((3, 1, 1, 4, 2))
    k[0, 0, 0] = -np.inf
    with np.errstate(invalid="ignore"):
        o, _ = attention(q, k, v, causal=True)
    assert np.isfinite(o[0, 0, 1:]).all()


def test_cosines_are_of_directions_and_divided_by_the_heads_temperature():
    q, k, v, temperature = *normal(3, 1, 2, 5, 4), np.array([0.2, -0.7])
    o, _ = attention(q, k, v, score="cosine", scale=1.5, temperature=temperature)
    qhat, khat = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
    for h, t in enumerate(temperature):
        head = [x[:, h : h + 1] for x in (qhat, khat, v)]
        np.testing.assert_allclose(o[:, h : h + 1], attention(*head, scale=1.5 / t)[0])
    plain, _ = attention(q, k, v, score="cosine")
    np.testing.assert_allclose(plain, attention(qhat, khat, v, scale=1.0)[0])
    np.testing.assert_allclose(attention(100 * q, k / 7, v, score="cosine")[0], plain)


def test_a_vector_of_zeros_has_cosine_0_and_no_gradient():
    q, k, v, do = normal(4, 1, 1, 4, 3)
    q[0, 0, 1] = k[0, 0, 2] = 0
    (o, lse), cache = attention(q, k, v, score="cosine", return_lse=True)
    np.testing.assert_allclose(o[0, 0, 1], v[0, 0].mean(0))
    np.testing.assert_allclose(lse[0, 0, 1], math.log(4))
    dq, dk, _ = attention_backward((do, lse), cache)
    assert (dq[0, 0, 1] == 0).all()
    assert (dk[0, 0, 2] == 0).all()
    assert np.isfinite(dq).all()
    assert np.isfinite(dk).all()


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
def test_a_temperature_is_finite_not_0_and_of_cosines(value):
    q, k, v = normal(3, 1, 2, 4, 3)
    with pytest.raises(ValueError, match=r"^attention: temperature must be finite and not 0"):
        attention(q, k, v, score="cosine", temperature=[1.0, value])
    with pytest.raises(ValueError, match=r"^attention: temperature must come with score='cosine'"):
        attention(q, k, v, temperature=[1.0, 1.0])


def test_temperatures_gradient_comes_last_and_only_where_it_was_given():
    q, k, v, do = normal(4, 1, 2, 4, 3)
    for given, count in ((None, 3), (np.ones(2), 4)):
        _, cache = attention(q, k, v, score="cosine", temperature=given)
        gradients = attention_backward(do, cache)
        assert len(gradients) == count
    assert gradients[3].shape == (2,)


def test_dropout_in_attention_counts_scores_in_64_bits_in_c_order():
    B, H, Tq, Tk = 2, 3, 4, 5
    q, k = np.zeros((B, H, Tq, Tk)), np.zeros((B, H, Tk, Tk))
    o, _ = attention(q, k, np.broadcast_to(np.eye(Tk), k.shape), dropout=0.4, seed=-3)
    for b, h, i, j in np.ndindex(B, H, Tq, Tk):
        index = np.array([((b * H + h) * Tq + i) * Tk + j])
        want = keep_mask(index, 0.4, -3)[0] / Tk / (1 - 0.4)
        np.testing.assert_allclose(o[b, h, i, j], want, rtol=1e-14)


def test_additive_attention_has_attentions_rules_for_what_is_not_there():
    q, k, v, do = normal(4, 2, 3, 4)
    w_q, w_k, w = normal(4, 5), normal(4, 5, seed=1), normal(5, seed=2)
    o, cache = additive_attention(q[:1], k[:1, :2], v[:1, :2], w_q, w_k, w)
    want = additive_attention_backward(do[:1], cache)
    # one key of the first row is not there, nor is any of the second
    k[0, 2] = v[0, 2] = q[1] = k[1] = v[1] = do[1] = np.nan
    both, cache = additive_attention(q, k, v, w_q, w_k, w, lengths=(2, 0))
    np.testing.assert_allclose(both[0], o[0], rtol=1e-14)
    assert (both[1] == 0).all()
    found = additive_attention_backward(do, cache)
    for got, alone in zip(found[:3], want[:3]):
        np.testing.assert_allclose(got[0, : alone.shape[1]], alone[0], rtol=1e-12, atol=1e-15)
        assert (got[1] == 0).all()
    for got, alone in zip(found[3:], want[3:]):
        np.testing.assert_allclose(got, alone, rtol=1e-12, atol=1e-15)


def pages_of(lengths, page, spare=2, D=4, fill=np.nan):
    """(k_pages, v_pages, block_table, k and v of every row)."""
    most = -(-max(lengths) // page)
    B = len(lengths)
    table = np.random.default_rng(0).permutation(B * most + spare)[: B * most].reshape(B, most)
    k, v = normal(2, B, 2, most * page, D)
    k_pages, v_pages = np.full((2, B * most + spare, 2, page, D), fill)
    for b, n in enumerate(lengths):
        for j in range(n):
            k_pages[table[b, j // page], :, j % page] = k[b, :, j]
            v_pages[table[b, j // page], :, j % page] = v[b, :, j]
    return k_pages, v_pages, table, k, v


@pytest.mark.parametrize("page", [3, 8])
@pytest.mark.parametrize("window", [None, 4])
def test_paged_attention_is_causal_bottom_right_by_lengths(page, window):
    """With NaN wherever a page holds what no row has; a contiguous cache is one page a row."""
    lengths, q = (8, 3, 5), normal(3, 4, 2, 4, seed=5)
    k_pages, v_pages, table, k, v = pages_of(lengths, page)
    o, _ = paged_attention(q, k_pages, v_pages, table, lengths, window=window)
    for b, n in enumerate(lengths):
        row = q[b : b + 1], k[b : b + 1, :, :n], v[b : b + 1, :, :n]
        want, _ = attention(*row, causal=True, window=window)
        np.testing.assert_allclose(o[b : b + 1], want, rtol=1e-13)


# ffn and losses


@pytest.mark.parametrize(
    ("activation", "f"),
    [
        (None, lambda z: F.gelu(z, approximate="tanh")),
        ("gelu_tanh", lambda z: F.gelu(z, approximate="tanh")),
        ("gelu", F.gelu),
        ("relu", F.relu),
    ],
)
def test_the_activation_is_gelu_by_tanh_unless_told(activation, f):
    x, w1, w2 = normal(5, 3), normal(3, 8), normal(8, 3)
    y, _ = ffn(
        x, w1, np.ones(8), w2, np.ones(3), **({"activation": activation} if activation else {})
    )
    want = f(torch.from_numpy(x @ w1 + 1)).numpy() @ w2 + 1
    np.testing.assert_allclose(y, want, rtol=1e-12, atol=1e-13)


def test_relu_has_gradient_0_at_0():
    eye = np.eye(3)
    y, cache = ffn(np.array([[-1.0, 0, 2]]), eye, np.zeros(3), eye, np.zeros(3), activation="relu")
    np.testing.assert_array_equal(y, [[0, 0, 2]])
    np.testing.assert_array_equal(ffn_backward(np.ones((1, 3)), cache)[0], [[0, 0, 1]])


def test_the_loss_is_lse_minus_the_logit_and_never_the_log_of_a_softmax():
    logits = np.array([[1e4, 0.0, -1e4]])
    for target, want in ((0, 0.0), (1, 1e4), (2, 2e4)):
        assert cross_entropy(logits, np.array([target]))[0] == want


def test_the_mean_divides_by_the_targets_that_are_not_ignored():
    logits, targets = normal(5, 7), np.array([3, -100, 0, -100, 6])
    losses, _ = cross_entropy(logits, targets, reduction="none")
    assert losses[1] == losses[3] == 0
    np.testing.assert_allclose(cross_entropy(logits, targets)[0], losses.sum() / 3, rtol=1e-15)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("ignored", [(), (1, 3), (0, 1, 2, 3, 4)], ids=["none", "some", "all"])
@pytest.mark.parametrize("ignore_index", [-100, 2])
def test_cross_entropy_agrees_with_torch_on_every_edge(reduction, smoothing, ignored, ignore_index):
    logits, targets = normal(5, 7), np.array([3, 1, 0, 5, 6])
    targets[list(ignored)] = ignore_index
    options = dict(ignore_index=ignore_index, label_smoothing=smoothing, reduction=reduction)
    loss, cache = cross_entropy(logits, targets, **options)
    theirs = torch.from_numpy(logits).requires_grad_()
    want = F.cross_entropy(theirs, torch.from_numpy(targets), **options)
    np.testing.assert_allclose(loss, want.detach().numpy(), rtol=1e-13)
    want.sum().backward()
    (dlogits,) = cross_entropy_backward(np.ones_like(loss), cache)
    # all ignored: the mean is NaN, and torch's gradient of it 0
    np.testing.assert_allclose(dlogits, theirs.grad.numpy(), rtol=1e-12, atol=1e-16)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("target", [0, 1])
@pytest.mark.parametrize("first", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("others", [[0.0, 1.0], [-np.inf, -np.inf], [0.0, np.inf]], ids=str)
def test_cross_entropy_of_what_is_not_finite_is_torchs(first, others, target, smoothing):
    logits = np.array([[first, *others]])
    theirs = torch.from_numpy(logits).requires_grad_()
    want = F.cross_entropy(theirs, torch.tensor([target]), label_smoothing=smoothing)
    want.backward()
    loss, cache = cross_entropy(logits, np.array([target]), label_smoothing=smoothing)
    (dlogits,) = cross_entropy_backward(1.0, cache)
    np.testing.assert_allclose(loss, want.detach().numpy(), rtol=1e-13)
    np.testing.assert_allclose(dlogits, theirs.grad.numpy(), rtol=1e-12)


def test_the_head_takes_w_as_wte_lies_and_never_needs_to_be_tied():
    x, w, b, targets = normal(5, 4), normal(7, 4), normal(7), np.array([3, 1, 0, 5, 6])
    loss, _ = linear_cross_entropy(x, w, targets, b)
    np.testing.assert_allclose(loss, cross_entropy(x @ w.T + b, targets)[0], rtol=1e-14)


# steps of optimisers


def one_step(op, **change):
    numbers = dict(step=3, lr=0.1, beta1=0.8, beta2=0.9, eps=0.01, weight_decay=0.2) | change
    return op(*np.array([[2.0], [0.5], [0.3], [0.04]]), **numbers)[0]


def test_adamw_decays_apart_corrects_the_bias_and_adds_epsilon_outside_the_root():
    p, m, v = one_step(adamw)
    np.testing.assert_allclose([*m, *v], [0.8 * 0.3 + 0.2 * 0.5, 0.9 * 0.04 + 0.1 * 0.25])
    direction = (m / (1 - 0.8**3)) / (np.sqrt(v / (1 - 0.9**3)) + 0.01)
    np.testing.assert_allclose(p, 2.0 * (1 - 0.1 * 0.2) - 0.1 * direction, rtol=1e-14)


def test_adam_folds_the_corrections_into_the_rate():
    p, m, v = one_step(adam)
    np.testing.assert_array_equal([m, v], one_step(adamw)[1:])
    rate = 0.1 * math.sqrt(1 - 0.9**3) / (1 - 0.8**3)
    np.testing.assert_allclose(p, 2.0 - rate * (m / (np.sqrt(v) + 0.01) + 0.2 * 2.0), rtol=1e-14)


# sample


def test_temperature_0_is_greedy_and_takes_the_lowest_of_equals():
    logits = np.array([[1.0, 3, 3, 2], [5, 1, 5, 5]])
    for u in (0.0, 0.99):
        token, _ = sample(logits, np.full(2, u), temperature=0)
        np.testing.assert_array_equal(token, [1, 0])


def test_the_penalty_comes_before_the_temperature_once_a_token():
    logits, previous = np.array([[2.0, -2.0, 1.0, 0.0]]), np.array([[0, 0, 1, -1, 0]])
    u = np.linspace(0, 0.999, 200)
    wide = np.broadcast_to(logits, (200, 4)), np.broadcast_to(previous, (200, 5))
    token, _ = sample(wide[0], u, 0.5, repetition_penalty=2.0, previous=wide[1])
    want, _ = sample(np.broadcast_to([1.0, -4.0, 1.0, 0.0], (200, 4)), u, 0.5)
    np.testing.assert_array_equal(token, want)


# what all have in common


SIGNATURES = {
    "linear": "x w b",
    "embedding": "tokens wte wpe positions",
    "layer_norm": "x w b eps",
    "residual_layer_norm": "x r w b eps",
    "attention": "q k v causal align window global_tokens lengths cu_seqlens scale dropout seed "
    "return_lse",
    "paged_attention": "q k_pages v_pages block_table lengths window scale",
    "additive_attention": "q k v w_q w_k w",
    "ffn": "x w1 b1 w2 b2 activation",
    "cross_entropy": "logits targets ignore_index label_smoothing reduction",
    "linear_cross_entropy": "x w targets b ignore_index label_smoothing reduction",
    "dropout": "x p seed",
    "adamw": "p g m v step lr beta1 beta2 eps weight_decay",
    "adam": "p g m v step lr beta1 beta2 eps weight_decay",
    "sample": "logits u temperature top_k top_p min_p",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_grow_by_keyword_options_alone(name):
    parameters = inspect.signature(getattr(reference, name)).parameters
    names = SIGNATURES[name].split()
    assert set(names) <= set(parameters)
    first = [n for n, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert first == names[: len(first)]
    for added in set(parameters) - set(names):
        assert parameters[added].kind is inspect.Parameter.KEYWORD_ONLY
        assert parameters[added].default is not inspect.Parameter.empty


@pytest.mark.parametrize("name", [n for n, op in CATALOG.items() if op.differentiable()])
def test_a_backward_gives_one_gradient_for_each_floating_input(name):
    op = CATALOG[name]
    case = op.select()[0]
    inputs = op.draw(case, np.random.default_rng(0))
    y, cache = op.called(getattr(reference, name))(*inputs.values(), **op.options(case))
    gradients = getattr(reference, f"{name}_backward")(y, cache)
    assert type(gradients) is tuple
    names = op.differentiable(inputs)
    assert [np.shape(g) for g in gradients] == [inputs[n].shape for n in names]


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


def test_masks_of_different_seeds_are_independent():
    n, p = 100_000, 0.3
    masks = [keep_mask((n,), p, seed) for seed in (0, 1, -1, 2**32)]
    for i, a in enumerate(masks):
        for b in masks[:i]:
            q = p * p + (1 - p) ** 2
            assert abs((a == b).sum() - n * q) <= 5 * math.sqrt(n * q * (1 - q))


def test_a_mask_depends_on_the_index_alone():
    whole = keep_mask((6, 50), 0.4, 9)
    np.testing.assert_array_equal(whole.ravel(), keep_mask((300,), 0.4, 9))
    tile = np.arange(300).reshape(6, 50)[2:5, 7:31]
    np.testing.assert_array_equal(whole[2:5, 7:31], keep_mask(tile, 0.4, 9))
    x = np.ones((50, 6)).T
    np.testing.assert_array_equal(dropout(x, 0.4, 9)[0] != 0, whole)


def test_an_element_is_kept_from_the_threshold_on():
    # p is a multiple of 2⁻³², so that a word equal to the threshold exists
    word = int(words(5, 1))
    assert keep_mask(np.array([5]), word / 2**32, 1)[0]
    assert not keep_mask(np.array([5]), (word + 1) / 2**32, 1)[0]


def test_dropout_is_its_definition():
    x = np.random.default_rng(0).standard_normal((3, 11))
    y, cache = dropout(x, 0.35, -3)
    (dx,) = dropout_backward(x, cache)
    for i, value in enumerate(x.flat):
        counter, key = (i, 0, 0, 0), (2**32 - 3, 2**32 - 1)
        kept = int(philox(counter, key)[0]) >= math.floor(0.35 * 2**32)
        assert y.flat[i] == dx.flat[i] == (value / (1 - 0.35) if kept else 0)


def test_both_ends_of_p():
    x = np.random.default_rng(0).standard_normal((4, 5))
    np.testing.assert_array_equal(dropout(x, 0, 1)[0], x)
    y, cache = dropout(x, 1, 1)
    assert (y == 0).all()
    assert (dropout_backward(x, cache)[0] == 0).all()


def test_a_dropped_element_is_0_whatever_it_holds():
    x = np.full(1000, np.nan)
    y, _ = dropout(x, 0.5, 1)
    np.testing.assert_array_equal(np.isnan(y), keep_mask((1000,), 0.5, 1))
    assert (y[~np.isnan(y)] == 0).all()


def test_both_summands_have_the_same_gradient_and_h_is_their_sum():
    rng = np.random.default_rng(0)
    x, r, dy, dh = rng.standard_normal((4, 3, 8))
    w, b = rng.standard_normal((2, 8))
    op = CATALOG["residual_layer_norm"]
    (_, h), (dx, dr, _, _) = evaluate(op, dict(x=x, r=r, w=w, b=b), {}, (dy, dh))
    np.testing.assert_array_equal(h, x + r)
    np.testing.assert_array_equal(dx, dr)
    _, (without, *_) = evaluate(op, dict(x=x, r=r, w=w, b=b), {}, (dy, 0 * dh))
    np.testing.assert_allclose(dx - without, dh, rtol=1e-12, atol=1e-14)


def test_a_missing_bias_has_no_gradient_and_is_a_bias_of_0():
    rng = np.random.default_rng(0)
    x, w, targets = rng.standard_normal((5, 8)), rng.standard_normal((11, 8)), np.arange(5)
    loss, cache = linear_cross_entropy(x, w, targets)
    dx, dw, db = linear_cross_entropy_backward(2.0, cache)
    zero, other = linear_cross_entropy(x, w, targets, np.zeros(11))
    assert db is None
    assert loss == zero
    for ours, want in zip((dx, dw), linear_cross_entropy_backward(2.0, other)):
        np.testing.assert_array_equal(ours, want)


def test_an_interval_holds_its_lower_end_and_not_its_upper():
    token, _ = sample(np.zeros((5, 4)), np.array([0.0, 0.25, 0.5, 0.75, np.nextafter(1, 0)]))
    np.testing.assert_array_equal(token, [0, 1, 2, 3, 3])


def test_either_neighbour_of_a_boundary_is_accepted_and_no_third():
    accepts, runs = CATALOG["sample"].accepts, [Arithmetic(np.dtype(np.float32)).array]
    logits = np.log(np.array([[0.25, 0.25, 0.25, 0.25]]))
    for u, right in ((0.5 - 1e-9, [1, 2]), (0.5 + 1e-9, [1, 2]), (0.6, [2])):
        inputs = dict(logits=logits, u=np.array([u]))
        ok = [i for i in range(4) if accepts(np.array([i]), inputs, {}, runs).all()]
        assert ok == right
