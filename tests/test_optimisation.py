"""Clipping by the global norm, schedules and sinusoidal positions against other sources."""

import math

import numpy as np
import pytest
import torch
import transformers
from gaugeblock.reference import (
    clip_grad_norm,
    cosine_schedule,
    embedding,
    linear_schedule,
    noam_schedule,
    sinusoidal_positions,
)

SHAPES = (3, 4), (7,), ()


def gradients(change=lambda g: g):
    rng = np.random.default_rng(0)
    return [change(rng.standard_normal(shape)) for shape in SHAPES]


@pytest.mark.parametrize("max_norm", [0.1, 1.0, 4.0, 1e6, math.inf, 0.0])
@pytest.mark.parametrize(
    "change",
    [
        lambda g: g,
        lambda g: 0 * g,
        lambda g: np.where(g == g.max(), np.inf, g),
        lambda g: np.where(g == g.min(), np.nan, g),
    ],
    ids=["normal", "zero", "inf", "nan"],
)
def test_clipping_is_torchs(change, max_norm):
    grads = gradients(change)
    params = [torch.zeros(g.shape, dtype=torch.float64, requires_grad=True) for g in grads]
    for p, g in zip(params, grads):
        p.grad = torch.from_numpy(np.array(g))
    norm = torch.nn.utils.clip_grad_norm_(params, max_norm)
    clipped, ours = clip_grad_norm(grads, max_norm)
    # torch takes the norm of the tensors' norms: other roundings
    np.testing.assert_allclose(ours, norm.item(), rtol=1e-14)
    for got, p in zip(clipped, params):
        np.testing.assert_allclose(got, p.grad.numpy(), rtol=1e-14)


def test_clipping_gives_back_the_kind_it_took_and_leaves_the_gradients():
    grads = gradients()
    before = [g.copy() for g in grads]
    as_list, norm = clip_grad_norm(grads, 0.5)
    as_tuple, _ = clip_grad_norm(tuple(grads), 0.5)
    as_dict, _ = clip_grad_norm(dict(zip("abc", grads)), 0.5)
    assert (type(as_list), type(as_tuple), type(as_dict)) == (list, tuple, dict)
    assert list(as_dict) == ["a", "b", "c"]
    for a, b, c, g, old in zip(as_list, as_tuple, as_dict.values(), grads, before):
        np.testing.assert_array_equal(g, old)
        np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(a, c)
        np.testing.assert_allclose(a, g * (0.5 / (norm + 1e-6)))
    clipped, same = clip_grad_norm([*grads, None], 0.5)
    assert clipped[-1] is None
    assert same == norm


@pytest.mark.parametrize("max_norm", [-1.0, math.nan])
def test_a_norm_that_is_none_is_refused(max_norm):
    with pytest.raises(ValueError, match=r"^clip_grad_norm: max_norm must be at least 0, got"):
        clip_grad_norm([np.ones(3)], max_norm)


def test_a_single_array_is_no_list_of_gradients():
    with pytest.raises(TypeError, match=r"^clip_grad_norm: grads must be a list, tuple or dict"):
        clip_grad_norm(np.ones(3), 1.0)


STEPS = np.arange(0, 130)


@pytest.mark.parametrize("warmup", [0, 1, 20])
@pytest.mark.parametrize(
    ("schedule", "theirs"),
    [
        (cosine_schedule, transformers.get_cosine_schedule_with_warmup),
        (linear_schedule, transformers.get_linear_schedule_with_warmup),
    ],
)
def test_schedules_without_a_floor_are_hugging_faces(schedule, theirs, warmup):
    optimiser = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=3e-4)
    factor = theirs(optimiser, warmup, 100).lr_lambdas[0]
    rates = schedule(STEPS[:101], peak=3e-4, warmup=warmup, total=100)
    np.testing.assert_allclose(rates, [3e-4 * factor(int(s)) for s in STEPS[:101]], atol=1e-19)


@pytest.mark.parametrize("schedule", [cosine_schedule, linear_schedule])
def test_edges_of_a_schedule(schedule):
    options = dict(peak=6e-4, warmup=10, total=110, floor=6e-5)
    rates = schedule(STEPS, **options)
    assert rates[0] == 0
    np.testing.assert_allclose(rates[1], 6e-5, rtol=1e-15)
    assert rates.max() == rates[10] == 6e-4
    # half the way from the peak to the floor
    np.testing.assert_allclose(rates[60], (6e-4 + 6e-5) / 2, rtol=1e-15)
    np.testing.assert_allclose(rates[110:], 6e-5, rtol=1e-15)
    assert (np.diff(rates[:11]) > 0).all()
    assert (np.diff(rates[10:111]) < 0).all()
    assert schedule(0, **options | {"warmup": 0}) == 6e-4
    # one number for one step
    assert schedule(60, **options) == rates[60]
    assert np.ndim(schedule(60, **options)) == 0
    np.testing.assert_array_equal(schedule(STEPS.reshape(13, 10), **options).ravel(), rates)


def test_noam_is_equation_3():
    rates = noam_schedule(np.arange(0, 10_000), n_embd=512)
    assert rates[0] == 0
    assert rates.argmax() == 4000
    for step in (1, 100, 3999, 4000, 4001, 9999):
        want = 512**-0.5 * min(step**-0.5, step * 4000**-1.5)
        np.testing.assert_allclose(rates[step], want, rtol=1e-15)
    np.testing.assert_allclose(noam_schedule(7, n_embd=512, factor=2.0), 2 * rates[7])
    np.testing.assert_allclose(noam_schedule(4, n_embd=64, warmup=4), 1 / 16)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: cosine_schedule(-1, peak=1, warmup=2, total=9), "cosine_schedule: step must be"),
        (lambda: linear_schedule(1, peak=1, warmup=-2, total=9), "linear_schedule: warmup must be"),
        (lambda: cosine_schedule(1, peak=1, warmup=9, total=9), "total must be more than warmup"),
        (lambda: linear_schedule(1, peak=1, warmup=2, total=9, floor=2), "floor must lie in 0 …"),
        (lambda: noam_schedule([3, math.nan], n_embd=8), "noam_schedule: step must be at least 0"),
        (lambda: noam_schedule(3, n_embd=8, warmup=0), "noam_schedule: warmup must be at least 1"),
        (lambda: sinusoidal_positions(0, 8), "sinusoidal_positions: T must be at least 1"),
        (lambda: sinusoidal_positions(8, 8, base=0.0), "sinusoidal_positions: base must be finite"),
    ],
)
def test_what_is_no_schedule_is_refused(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("C", [1, 2, 7, 16])
def test_sinusoidal_positions_are_those_of_section_3_5(C):
    table = sinusoidal_positions(50, C)
    assert table.shape == (50, C)
    for t in range(50):
        for c in range(C):
            angle = t / 10000 ** ((c - c % 2) / C)
            want = math.cos(angle) if c % 2 else math.sin(angle)
            # an angle of up to 50 is rounded
            assert abs(table[t, c] - want) <= 50 * np.finfo(float).eps


def test_an_offset_of_positions_is_a_rotation():
    """The paper's reason: PE(t + k) is a linear function of PE(t)."""
    table = sinusoidal_positions(40, 8, base=100.0).reshape(40, 4, 2)
    sin, cos = table[3].T
    turn = np.stack([np.stack([cos, sin], -1), np.stack([-sin, cos], -1)], -2)  # (C/2, 2, 2)
    turned = np.einsum("ced,tcd->tce", turn, table[:-3])
    np.testing.assert_allclose(turned, table[3:], atol=1e-14)


def test_sinusoidal_positions_stand_in_for_wpe():
    tokens, wte = np.array([[2, 0, 1]]), np.random.default_rng(0).standard_normal((3, 6))
    y, _ = embedding(tokens, wte, sinusoidal_positions(5, 6))
    np.testing.assert_array_equal(y[0], wte[[2, 0, 1]] + sinusoidal_positions(3, 6))
