"""What values alone do not show: the oracle sees damage, stale results and unwritten memory."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from gaugeblock.kernels import eager
from gaugeblock.reference.oracle import Case, Op, check
from gaugeblock.reference.oracle.adapters import LAYOUTS, NumpyAdapter, TorchAdapter

ROWS = Op(
    "double",
    reference=lambda x: 2 * x,
    backward=lambda dy, x: (2 * dy,),
    inputs={"x": "B N"},
    outputs={"y": "B N"},
    cases=[Case("odd", B=3, N=17)],
    batch="B",
)
# 2·x is exact in every kernel, x/3 is not
THIRDS = replace(ROWS, reference=lambda x: x / 3, backward=lambda dy, x: (dy / 3,), name="third")
LAYOUT = ("contiguous",)


def kinds(fn, op=ROWS, **settings):
    settings = {"layouts": LAYOUT, "backward": False} | settings
    return {r.kind for r in check(op, fn, **settings).failures}


def test_a_right_candidate_has_no_such_failure():
    for layout in LAYOUTS:
        claims = {"deterministic": True, "batch_invariant": True}
        assert check(ROWS, lambda x: 2 * x, layouts=(layout,), **claims).passed


def test_an_input_that_was_changed():
    def overwrites(x):
        y = 2 * x
        x.mul_(2)
        return y

    report = check(ROWS, overwrites, layouts=LAYOUT, backward=False)
    assert [(r.kind, r.hint) for r in report.failures] == [("damage", "changed x")]


def test_a_write_past_the_end_of_an_input():
    def writes_outside(x):
        torch.as_strided(x, (1,), (1,), x.storage_offset() + x.numel()).fill_(1.0)
        return 2 * x

    report = check(ROWS, writes_outside, layouts=LAYOUT, backward=False)
    assert [(r.kind, r.hint) for r in report.failures] == [("damage", "wrote outside x")]


def test_a_write_into_the_gradient_of_the_output():
    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        def backward(ctx, dy):
            return dy.mul_(2)

    report = check(ROWS, Function.apply, layouts=LAYOUT)
    assert [r.hint for r in report.failures] == ["changed the gradient of output 0"]


def test_a_read_past_the_row_of_a_slice():
    def reads_the_gap(x):
        wide = torch.as_strided(x, (x.shape[0], x.shape[1] + 1), x.stride(), x.storage_offset())
        return (2 * wide + 0 * wide.sum(1, keepdim=True))[:, :-1]

    assert kinds(reads_the_gap, layouts=("sliced",)) == {"nonfinite"}


def test_memory_that_was_never_written():
    def leaves_a_tail(x):
        y = torch.empty_like(x)
        y[:, :-1] = 2 * x[:, :-1]
        return y

    report = check(ROWS, leaves_a_tail, layouts=LAYOUT, backward=False)
    assert not report.passed
    found = {r.kind for r in report.failures}
    assert found <= {"uninitialised", "nonfinite", "row", "stale"}

    def hopes_for_the_best(x):
        # what was there before happens to be right, until all of it is filled: NaN that an
        # earlier test left is overwritten by the allocator where it starts
        y = torch.empty_like(x)
        filled = torch.isnan(y).all()
        return y if filled else 2 * x

    assert kinds(hopes_for_the_best) == {"uninitialised"}


def test_a_result_cached_by_address():
    cache = {}

    def cached(x):
        return cache.setdefault((x.data_ptr(), x.shape), 2 * x).clone()

    assert kinds(cached) == {"stale"}


def test_the_answer_of_the_call_before():
    last = []

    def late(x):
        last.append(2 * x.clone())
        return last[-2] if len(last) > 1 else last[-1]

    assert kinds(late) == {"stale"}


def test_right_on_the_first_call_only():
    first = []

    def once(x):
        if not first:
            first.append(2 * x)
        return first[0].clone()

    assert kinds(once) == {"stale"}


def test_bits_that_change_are_held_against_the_claim():
    state = itertools.count()

    def wanders(x):
        return x / 3 * (1 + (next(state) % 2) * 2.0**-23)

    assert kinds(wanders, THIRDS) == set()
    report = check(THIRDS, wanders, layouts=LAYOUT, backward=False, deterministic=True)
    assert [r.kind for r in report.failures] == ["repeat"]
    assert "changes from run to run" in report.failures[0].hint


def test_a_row_that_depends_on_its_neighbours():
    def mixes(x):
        return x / 3 * (1 + (len(x) > 1) * 2.0**-23)

    assert kinds(mixes, THIRDS) == set()
    report = check(THIRDS, mixes, layouts=LAYOUT, backward=False, batch_invariant=True)
    assert [(r.kind, r.output) for r in report.failures] == [("batch", "y")]


def test_a_case_without_a_batch_says_so():
    op = Op("double", lambda x: 2 * x, {"x": "N"}, [Case("odd", N=7)], batch="B")
    report = check(op, lambda x: 2 * x, backward=False, batch_invariant=True)
    assert report.passed
    assert any("batch invariance" in line for line in report.not_checked)


def test_a_gradient_whose_stride_is_0_or_lies_apart():
    class TakesItsMemory(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        def backward(ctx, dy):
            return 2 * torch.as_strided(dy, dy.shape, (dy.shape[1], 1), dy.storage_offset())

    assert check(ROWS, TakesItsMemory.apply, layouts=LAYOUT).passed
    for layout in ("broadcast_grad", "sliced", "transposed"):
        assert not check(ROWS, TakesItsMemory.apply, layouts=(layout,)).passed


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("adapter", [NumpyAdapter(), TorchAdapter()], ids=["numpy", "torch"])
def test_layouts_hold_the_same_values_in_other_places(adapter, layout):
    x = np.arange(2 * 3 * 4 * 5, dtype=np.float32).reshape(2, 3, 4, 5)
    if layout == "expanded":
        x[:] = x[:1]
    session = adapter.open({"x": x}, {}, None, layout)
    tensor = session.arguments["x"].tensor
    got = np.asarray(tensor)
    np.testing.assert_array_equal(got.swapaxes(1, 2) if layout == "bthd" else got, x)
    strides = [s // (4 if isinstance(tensor, np.ndarray) else 1) for s in _strides(tensor)]
    assert strides == {
        "contiguous": [60, 20, 5, 1], "offset": [60, 20, 5, 1], "broadcast_grad": [60, 20, 5, 1],
        "transposed": [60, 5, 15, 1], "sliced": [156, 52, 13, 1], "expanded": [0, 20, 5, 1],
        "bthd": [60, 15, 5, 1],
    }[layout]  # fmt: skip
    address = tensor.ctypes.data if isinstance(tensor, np.ndarray) else tensor.data_ptr()
    assert address % 64 == (4 if layout == "offset" else 0)


def _strides(x):
    return x.strides if isinstance(x, np.ndarray) else x.stride()


def test_an_argument_updated_in_place_may_be_returned_or_not():
    op = Op("add_one", lambda p: p + 1, {"p": "M N"}, [Case("odd", M=3, N=5)], updates={"y": "p"})

    def in_place(p):
        p.add_(1)

    assert check(op, in_place, backward=False, layouts=LAYOUT).passed
    assert check(op, lambda p: p + 1, backward=False, layouts=LAYOUT).passed
    assert not check(op, lambda p: p, backward=False, layouts=LAYOUT).passed
    assert not check(ROWS, lambda x: None, backward=False, layouts=LAYOUT).passed


def test_heads_may_lie_behind_time():
    def bthd(q, k, v, causal=False, scale=None, align="bottom_right"):
        q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
        options = {"causal": causal, "scale": scale, "align": align}
        return eager.attention(q, k, v, **options).swapaxes(1, 2)

    settings = {"expression": "longer_cache or causal and not (return_lse or dropout or grouped or"
                " lengths or window or cu_seqlens)"}  # fmt: skip
    assert check("attention", bthd, layouts=("bthd",), **settings).passed
    assert not check("attention", bthd, layouts=("contiguous",), **settings).passed
