"""Edges of the reference that have a rule of their own; the proofs of all ops: test_proof."""

import numpy as np
from gaugeblock.reference.catalog import CATALOG

from gaugeblock import reference
from tests.proof.points import point

HIDDEN_NAN = "top_left_hidden_nan"


def test_the_output_of_a_hidden_nan_is_finite():
    case = next(c for c in CATALOG["attention"].cases if c.name == HIDDEN_NAN)
    p = point(CATALOG["attention"], case)
    assert np.isnan(p.inputs["k"]).any()
    assert all(np.isfinite(x).all() for x in (*p.at(), *p.gradients()))


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
