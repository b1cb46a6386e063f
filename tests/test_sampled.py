"""At benchmark shapes parts of each tensor are compared: the same values, the same budgets."""

import functools
from dataclasses import replace

import numpy as np
import pytest
import torch
from gaugeblock.benchmarks.gate import Gate, Refused
from gaugeblock.kernels import eager
from gaugeblock.reference.catalog import CATALOG
from gaugeblock.reference.oracle import Case, Op, check
from gaugeblock.reference.oracle import sampled as module
from gaugeblock.reference.oracle.adapters import Take, TorchAdapter, adapter
from gaugeblock.reference.oracle.budget import budget
from gaugeblock.reference.oracle.expectation import Content, Expectation
from gaugeblock.reference.oracle.sampled import Sampled, expectation_of, spread
from gaugeblock.reference.rows.values import offset_64

from gaugeblock import reference

DTYPES = ("float32", "bfloat16")
_ADAMW = dict(step=10, lr=0.1, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1)


def _values(op, name):
    """The values of a catalog case."""
    return next(case for case in CATALOG[op].cases if case.name == name).values


# larger than what is compared of them
CASES = {
    "layer_norm": [Case("rows", M=700, N=200, tags=("bench",))],
    "residual_layer_norm": [Case("rows", M=400, N=150, tags=("bench",))],
    "linear": [Case("rows", M=500, K=70, N=300, tags=("bench",))],
    "embedding": [Case("tokens", B=4, T=100, V=700, P=300, C=24, tags=("bench",))],
    "dropout": [Case("rows", M=900, N=40, p=0.3, seed=-5, tags=("bench",))],
    "adamw": [Case("rows", M=900, N=40, values=_values("adamw", "odd"), tags=("bench",), **_ADAMW)],
    "adam": [Case("rows", M=900, N=40, values=_values("adam", "odd"), tags=("bench",), **_ADAMW)],
    "additive_attention": [
        # dw is one row: its largest error is that of the whole only if few columns are left out
        Case("rows", B=11, Tq=5, Tk=9, C=6, K=7, D=8, A=33, tags=("bench",)),
        Case("lengths", B=9, Tq=5, Tk=9, C=6, K=7, D=8, A=33, tags=("bench",),
             lengths=(9, 1, 2, 3, 4, 5, 6, 7, 8)),
    ],
    "ffn": [
        Case("rows", M=300, C=150, F=160, tags=("bench",)),
        Case("relu_rank_three", B=3, T=130, C=20, F=140, activation="relu", tags=("bench",),
             shapes={"x": "B T C", "y": "B T C"}),
    ],
    "cross_entropy": [
        Case("ignored", M=500, V=200, values=_values("cross_entropy", "ignored"), tags=("bench",)),
        Case("none_smoothed", B=5, T=100, V=90, reduction="none", label_smoothing=0.1,
             shapes={"logits": "B T V", "targets": "B T", "loss": "B T"}, tags=("bench",)),
    ],
    "linear_cross_entropy": [
        Case("ignored", M=400, C=24, V=300, tags=("bench",),
             values=_values("linear_cross_entropy", "ignored")),
        Case("sum_smoothed", M=400, C=24, V=300, reduction="sum", label_smoothing=0.2,
             tags=("bench",)),
    ],
    "sample": [
        Case("filtered", M=500, V=300, top_k=20, top_p=0.8, tags=("bench",),
             values=_values("sample", "odd")),
    ],
    "paged_attention": [
        Case("rows", B=11, H=4, Hkv=2, Tq=2, D=8, page=16, pages=5, P=60, tags=("bench",),
             window=30, values=_values("paged_attention", "grouped_heads")),
    ],
    "attention": [
        Case("causal", B=1, H=1, Tq=330, Tk=330, D=32, causal=True, tags=("bench",)),
        # dp and delta cancel: the rounding of o before delta shows
        Case("offset", B=1, H=1, Tq=330, Tk=330, D=32, tags=("bench",), values={"v": offset_64}),
    ],
}  # fmt: skip
# what the catalog's kernel lacks
PENALTY = Case("penalty", M=500, V=300, P=20, repetition_penalty=2.0, tags=("bench",),
               values=_values("sample", "penalty"), keywords=("previous",))  # fmt: skip
POINTS = [pytest.param(op, c, id=f"{op}-{c.name}") for op, cases in CASES.items() for c in cases]


def _masked(name, B, H, Tq, Tk, **rest):
    return Case(name, B=B, H=H, Tq=Tq, Tk=Tk, D=6, tags=("bench",), **rest)


MASKS = [
    _masked("full_longer_cache", 2, 2, 130, 300),
    _masked("grouped", 2, 4, 150, 150, Hkv=2, causal=True, return_lse=True),
    _masked("top_left", 1, 2, 300, 190, causal=True, align="top_left", scale=-0.4),
    _masked("unseeing", 1, 2, 300, 190, causal=True, return_lse=True),
    _masked("window", 1, 1, 600, 600, causal=True, window=70),
    _masked("window_both_sides", 3, 1, 200, 300, window=20),
    _masked("global", 1, 2, 400, 400, causal=True, window=30, global_tokens=5),
    _masked("lengths", 3, 2, 90, 310, causal=True, lengths=(310, 0, 64), return_lse=True),
    _masked("documents", 1, 2, 500, 500, causal=True, cu_seqlens=(0, 0, 130, 131, 500)),
    _masked("dropout", 2, 4, 150, 200, Hkv=2, dropout=0.3, seed=-9, causal=True),
    _masked("many_heads", 5, 8, 80, 80, causal=True),
    _masked("stride", 1, 2, 300, 400, causal=True, window=20, stride=60),
]


def both(op, case, dtype):
    """(sampled content, content of the whole) of the same inputs."""
    part = Sampled(op, case, dtype).content()
    wide = {
        name: x if x is None or x.dtype.kind in "iu" else x.astype(np.float64)
        for name, x in part.inputs.items()
    }
    dys = None
    if part.dys is not None:
        dys = tuple(dy.astype(np.float64) for dy in part.dys)
    return part, Content(Expectation(op, case, dtype), part.inputs, wide, dys)


def compared(part, whole):
    """(name, which part, number, Take, exact values, those of the whole there)."""
    for p in (0, 1):
        for i, name in enumerate(part.names(p)):
            if p == 0 or part.dys is not None:
                want = np.asarray(whole.exact[p][i])
                take = part.take(name)
                yield name, p, i, take, part.exact[p][i], want[take.of(want.shape)]


@pytest.mark.parametrize(
    ("op", "case"),
    [
        *POINTS,
        *(pytest.param("attention", c, id=c.name) for c in MASKS),
        pytest.param("sample", PENALTY, id="sample-penalty"),
    ],
)
def test_values_are_those_of_the_whole(op, case):
    part, whole = both(CATALOG[op], case, "float32")
    smaller = 0
    for name, p, i, _, got, want in compared(part, whole):
        want = want.reshape(got.shape)
        np.testing.assert_array_equal(np.isfinite(got), np.isfinite(want))
        largest = np.abs(want[np.isfinite(want)]).max()
        assert largest > 0
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-12 * largest, err_msg=name)
        smaller += got.size < np.asarray(whole.exact[p][i]).size
    # something was left out, so that the test is one of parts
    assert smaller


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("op", "case"), [p for p in POINTS if p.values[0] != "sample"])
def test_budgets_are_those_of_the_whole(op, case, dtype):
    part, whole = both(CATALOG[op], case, dtype)
    for name, p, i, take, got, want in compared(part, whole):
        mine, all_of_it = (c.bound(p, i, dtype).budget for c in (part, whole))
        index = take.of(all_of_it.rows.shape)
        ratio = np.median(mine.rows / all_of_it.rows[index].reshape(got.shape))
        assert 1 / 1.5 < ratio < 1.5, (name, ratio)
        legal = [np.asarray(run[p][i])[index].reshape(got.shape) for run in whole.legal]
        rms = budget(want.reshape(got.shape), legal, module.DTYPES[dtype]).rms
        assert 1 / 1.5 < mine.rms / rms < 1.5, (name, mine.rms / rms)


def _right(op, dtype):
    """(function, backward) of NumPy that give the exact answers, rounded."""
    storage = module.DTYPES[dtype]

    def wide(arrays):
        return [x if x is None or x.dtype.kind in "iu" else x.astype(float) for x in arrays]

    def rounded(ys):
        ys = ys if isinstance(ys, tuple) else (ys,)
        return tuple(
            np.asarray(y).astype(storage) if np.asarray(y).dtype.kind == "f" else y
            for y in ys
            if y is not None
        )

    def fn(*arrays, **options):
        return rounded(getattr(reference, op)(*wide(arrays), **options)[0])

    def backward(dy, *arrays, **options):
        _, cache = getattr(reference, op)(*wide(arrays), **options)
        dy = wide(dy) if isinstance(dy, tuple) else wide([dy])[0]
        return rounded(getattr(reference, f"{op}_backward")(dy, cache))

    return fn, backward if CATALOG[op].differentiable() else False


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("op", "case"), POINTS)
def test_right_answers_pass_and_one_wrong_value_does_not(op, case, dtype):
    expectation = Sampled(CATALOG[op], case, dtype)
    part, (fn, backward) = expectation.content(), _right(op, dtype)
    results = expectation.judge(adapter("numpy", backward=backward), fn)
    assert [r for r in results if not r.passed] == []
    assert [r.output for r in results] == [*part.names(0), *(part.names(1) if backward else ())]

    def damaged(i, call, *arrays, **options):
        """The last value that is compared is off by its own size, or a token is another."""
        ys = [np.array(y) for y in call(*arrays, **options)]
        place = tuple(axis[-1, -1] for axis in np.broadcast_arrays(*takes[i].of(ys[i].shape)))
        ys[i][place] = ys[i][place] + 1 if ys[i].dtype.kind in "iu" else 3 * ys[i][place] + 1
        return tuple(ys)

    outputs = fn(*part.inputs.values(), **expectation.options)
    for p, call in ((0, fn), (1, backward)):
        takes = [part.take(name) for name in part.names(p)] if call else []
        for i in range(len(takes)):
            wrong = functools.partial(damaged, i, call)
            calls = (wrong, backward) if p == 0 else (fn, wrong)
            results = expectation.judge(adapter("numpy", backward=calls[1]), calls[0])
            (failure,) = [r for r in results if not r.passed]
            assert failure.output == part.names(p)[i]
            shape = part.inputs[failure.output[1:]].shape if p else np.shape(outputs[i])
            assert len(failure.index) == len(shape)
            assert all(at < n for at, n in zip(failure.index, shape))


GRADIENTS = {"dq", "dk", "dv"}
LONG = Case("long", B=2, H=2, Tq=700, Tk=700, D=16, causal=True, tags=("bench",))


@functools.cache
def long_attention(dtype):
    return Sampled(CATALOG["attention"], LONG, dtype)


def _attention(forward=lambda o: o, q_grad=1.0, k_grad=1.0, hide=None):
    """Attention with something wrong."""

    def fn(q, k, v, causal=False):
        s = (q.float() * 16**-0.5) @ k.float().transpose(-1, -2)
        mask = torch.ones(s.shape[-2:], dtype=torch.bool).tril()
        if hide is not None:
            mask[:, hide] = False
        p = s.masked_fill(~mask, -torch.inf).softmax(-1)
        return forward((p @ v.float()).to(q.dtype))

    def scaled(q, k, v, causal=False):
        q, k = (x * g + (x - x * g).detach() for x, g in ((q, q_grad), (k, k_grad)))
        return fn(q, k, v)

    return scaled


def _last_row(o):
    return torch.cat([o[:, :, :-1], 1.1 * o[:, :, -1:]], 2)


def _first_of_tiles(o):
    return torch.where((torch.arange(o.shape[2]) % 64 == 0)[:, None], 1.3 * o, o)


@pytest.mark.parametrize(
    ("fn", "outputs", "hint"),
    [
        (_attention(), set(), ""),
        (_attention(_last_row), {"o"}, "only Tq 699 (the last)"),
        (_attention(_first_of_tiles), {"o"}, "only the first Tq of each tile of 64"),
        (_attention(hide=slice(384, 512)), {"o", "dq", "dk", "dv"}, "only Tq from "),
        (_attention(k_grad=4.0), {"dk"}, "constant factor 4"),
        (_attention(q_grad=0.5), {"dq"}, "constant factor 0.5"),
        (_attention(lambda o: o[:, :, :-1]), {"outputs"}, "must return shape"),
    ],
    ids=["right", "last row", "tiles", "dropped tile", "dk scale", "dq scale", "shape"],
)
def test_a_wrong_kernel_is_named_where_it_is_wrong(fn, outputs, hint):
    results = long_attention("float32").judge(TorchAdapter(), fn)
    failures = [r for r in results if not r.passed]
    # what is wrong in o is wrong in what comes of it too
    assert {r.output for r in failures} - GRADIENTS == outputs - GRADIENTS
    assert {r.output for r in failures} >= outputs
    assert not failures or hint in failures[0].hint
    for r in failures:
        assert r.output == "outputs" or all(i < n for i, n in zip(r.index, (2, 2, 700, 16)))


def test_other_heads_wrong_are_missed_and_values_elsewhere_must_be_finite():
    case = Case("heads", B=5, H=4, Tq=300, Tk=300, D=4, causal=True, tags=("bench",))
    row = replace(CATALOG["attention"], cases=(case,))
    content = Sampled(row, case, "float32").content()
    heads = np.unique(content.take("o").rows // 300)
    assert len(heads) == 8
    missed = next(h for h in range(20) if h not in heads)

    def with_nan(o):
        hole = torch.zeros(20, dtype=torch.bool)
        hole[missed] = True
        return torch.where(hole.reshape(5, 4, 1, 1), torch.nan, o)

    def fn(q, k, v, causal=False):
        return with_nan(eager.attention(q, k, v, causal=causal))

    (failure,) = check(row, fn, cases="bench", backward=False).failures
    assert (failure.output, failure.kind) == ("o", "nonfinite")
    assert "outside the elements that are compared" in failure.hint


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced", "expanded", "offset",
                                    "broadcast_grad", "bthd"])  # fmt: skip
def test_layouts(layout):
    def fn(q, k, v, causal=False):
        if layout != "bthd":
            return eager.attention(q, k, v, causal=causal)
        return eager.attention(
            *(x.transpose(1, 2) for x in (q, k, v)), causal=causal
        ).transpose(1, 2)  # fmt: skip

    results = long_attention("bfloat16").judge(TorchAdapter(), fn, layout)
    assert [r for r in results if not r.passed] == []
    assert {r.layout for r in results} == {layout}
    assert {r.output for r in results} == {"o", *GRADIENTS}


@pytest.mark.parametrize(("op", "case"), [p for p in POINTS if CATALOG[p.values[0]].kernel is None])
def test_torch_candidates_pass(op, case):
    row = replace(CATALOG[op], cases=(case,))
    report = check(row, getattr(eager, op), cases="bench", dtypes=("bfloat16",))
    assert report.passed, report.failures
    given = row.draw(case, np.random.default_rng(0))
    compared = {r.output for r in report.results}
    assert compared - set(row.outputs) == {f"d{name}" for name in row.differentiable(given)}
    assert compared & set(row.outputs)
    assert [line for line in report.not_checked if "stale results" in line]


def test_writes_into_inputs_are_seen():
    row = replace(CATALOG["layer_norm"], cases=CASES["layer_norm"])

    def fn(x, w, b, eps=1e-5):
        y = eager.layer_norm(x, w, b, eps)
        x.detach()[3, 5] = 0
        return y

    failures = check(row, fn, cases="bench", backward=False).failures
    assert [(r.kind, r.output) for r in failures] == [("damage", "inputs")]
    results = Sampled(row, row.cases[0], "float32", backward=False).judge(TorchAdapter(), fn)
    assert [r.kind for r in results if not r.passed] == ["damage"]


def test_only_parts_leave_the_candidate():
    case = CASES["attention"][0]
    expectation = Sampled(CATALOG["attention"], case, "float32")
    outputs, gradients = expectation.open(TorchAdapter()).run(eager.attention)
    assert [a.shape for a in (*outputs, *gradients)] == [(1, 1, 330, 32)] * 4
    assert [a.values.shape for a in (*outputs, *gradients)] == [(256, 32)] * 4
    assert all(a.finite for a in (*outputs, *gradients))


def test_output_gradients_are_not_the_inputs():
    content = Sampled(CATALOG["attention"], LONG, "float32").content()
    assert np.abs(np.corrcoef(content.dys[0].ravel(), content.inputs["q"].ravel())[0, 1]) < 0.05


def test_values_repeat_without_equal_rows(monkeypatch):
    monkeypatch.setattr(module, "_PERIOD", 1009)
    case = Case("large", M=900, N=64, tags=("bench",))
    x = Sampled(CATALOG["layer_norm"], case, "float32").content().inputs["x"]
    assert x.shape == (900, 64)
    assert len(np.unique(x)) == 1009
    assert len(np.unique(x, axis=0)) == 900


def test_spread_holds_both_ends_and_edges_of_tiles():
    for n, count in ((16384, 256), (1000, 32), (257, 256), (130, 64)):
        chosen = spread(n, count, np.random.default_rng(n))
        assert len(chosen) == count
        assert (np.diff(chosen) > 0).all()
        assert {0, 63, 64, 127, 128, n - 1, (n - 1) // 128 * 128} <= {*chosen}
    edges = [i for i in spread(16384, 256, np.random.default_rng(0)) if i % 64 in (0, 63)]
    assert len(edges) > 100
    np.testing.assert_array_equal(spread(40, 256, None), np.arange(40))
    assert {901, 77} <= {*spread(1000, 32, np.random.default_rng(0), [901, 77])}


def test_take_indexes_rows_in_c_order():
    x = np.arange(2 * 3 * 5).reshape(2, 3, 5)
    np.testing.assert_array_equal(x[Take(np.array([4, 0])).of(x.shape)], x.reshape(6, 5)[[4, 0]])
    columns = Take(np.array([1, 5]), np.array([[0, 4], [2, 3]]))
    np.testing.assert_array_equal(x[columns.of(x.shape)], [[5, 9], [27, 28]])
    assert x[0, 0, 0][Take(np.array([0])).of(())] == 0


def test_every_op_of_the_catalog_has_parts():
    assert [name for name, op in CATALOG.items() if op.sampled is None] == []
    assert set(CASES) == set(CATALOG)


def test_an_op_without_parts_is_compared_whole():
    case = Case("timed", M=5, N=7, tags=("bench",))
    op = Op("double", lambda x: 2 * x, {"x": "M N"}, [case], backward=lambda dy, x: 2 * dy)
    assert type(expectation_of(op, case, "float32")) is Expectation
    assert check(op, lambda x: 2 * x, cases="bench").passed
    assert not check(op, lambda x: 3 * x, cases="bench").passed


def test_bench_selects_what_is_timed_and_leaves_out_what_does_not_fit(monkeypatch):
    op = CATALOG["layer_norm"]
    names = {case.name for case in op.select("bench")}
    assert names == {case.name for case in op.cases if "bench" in case.tags}
    assert [c.name for c in op.select("bench", "cpu")] == ["cpu_bench"]
    monkeypatch.setattr(module, "_COPIES", 1e12)
    report = check(op, eager.layer_norm, cases="bench", expression="cpu")
    assert report.not_checked == [
        *TorchAdapter.not_checked, "cpu_bench: needs more memory than there is",
    ]  # fmt: skip
    assert not report.passed


def test_the_gate_runs_the_very_shape():
    case = next(c for c in CATALOG["layer_norm"].cases if c.name == "gpt2_width")
    shapes = []

    def fn(x, w, b, eps=1e-5):
        shapes.append(tuple(x.shape))
        return eager.layer_norm(x, w, b, eps)

    def last_row_wrong(x, w, b, eps=1e-5):
        y = eager.layer_norm(x, w, b, eps)
        return torch.cat([y[:-1], 1.01 * y[-1:]])

    gate = Gate(CATALOG["layer_norm"], case, "float32", "cpu")
    assert all(r.passed for r in gate.check(fn))
    assert shapes == [(32768, 768), (8192, 192)]
    with pytest.raises(Refused, match=r"only M 32767 \(the last\)"):
        gate.check(last_row_wrong)


@pytest.mark.slow
def test_attention_of_16384_keys():
    """Float32 accumulators pass; a dropped tile, a wrong last row, a missing scale do not."""
    T, D = 16384, 128
    case = Case("16k", B=1, H=1, Tq=T, Tk=T, D=D, causal=True, tags=("bench",))
    expectation = Sampled(CATALOG["attention"], case, "bfloat16")

    def judge(change=lambda results: results):
        results = expectation.judge(TorchAdapter(), _Fixed(change(list(answers))))
        return {r.output for r in results if not r.passed}

    adapter = TorchAdapter()
    q, k, v = (p.tensor.clone() for p in expectation.open(adapter).arguments.values())
    do = torch.from_numpy(expectation.content().dys[0].astype(np.float32)).bfloat16()
    answers = _blocked_attention(q, k, v, do)
    assert judge() == set()
    hidden = _blocked_attention(q, k, v, do, hide=slice(4096, 4096 + 128))
    assert judge(lambda results: hidden[:1] + results[1:]) == {"o"}
    assert judge(lambda results: [_last_row(results[0]), *results[1:]]) == {"o"}
    assert judge(lambda results: [*results[:2], results[2] * D**0.5, results[3]]) == {"dk"}
    assert judge(lambda results: [*results[:3], results[3].roll(1, 2)]) == {"dv"}


class _Fixed:
    """A candidate that has its answers."""

    def __init__(self, answers):
        self.answers = answers

    def __call__(self, q, k, v, causal=False):
        class Function(torch.autograd.Function):
            @staticmethod
            def forward(ctx, q, k, v):
                return self.answers[0].clone()

            @staticmethod
            def backward(ctx, do):
                return tuple(self.answers[1:])

        return Function.apply(q, k, v)


def _blocked_attention(q, k, v, do, hide=None, rows=256):
    """[o, dq, dk, dv] with float32 accumulators and bfloat16 weights, as on a GPU."""
    T, D = q.shape[-2:]
    o, dq, dk, dv = (torch.zeros(1, 1, T, D) for _ in range(4))
    for start in range(0, T, rows):
        end = start + rows
        Q, K, V, dO = (x[0, 0].float() for x in (q[:, :, start:end], k[:, :, :end],
                                                 v[:, :, :end], do[:, :, start:end]))  # fmt: skip
        unseen = torch.arange(end) > torch.arange(start, end)[:, None]
        if hide is not None:
            unseen[:, hide] = True
        s = (Q @ K.T * D**-0.5).masked_fill(unseen, -torch.inf)
        p = s.softmax(-1).nan_to_num()
        out = (p.bfloat16().float() @ V).bfloat16()
        o[0, 0, start:end] = out
        delta = (dO * out.float()).sum(-1, keepdim=True)
        ds = (p * (dO @ V.T - delta)).bfloat16().float()
        dq[0, 0, start:end] = ds @ K * D**-0.5
        dk[0, 0, :end] += ds.T @ Q * D**-0.5
        dv[0, 0, :end] += p.bfloat16().float().T @ dO
    return [x.bfloat16() for x in (o, dq, dk, dv)]
