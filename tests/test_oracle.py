"""The oracle names wrong kernels wrong, right ones right, and explains."""

import json
import math
from itertools import chain

import numpy as np
import pytest
import torch
from gaugeblock.kernels import eager
from gaugeblock.reference.catalog import CATALOG
from gaugeblock.reference.oracle import Case, Input, Op, check
from gaugeblock.reference.oracle.adapters import Answer
from gaugeblock.reference.oracle.budget import DTYPES, ulp
from gaugeblock.reference.oracle.expectation import Expectation

from tests.helpers import gaugeblock

LEAST_DISCRIMINATION = {"float32": 100, "float16": 100, "bfloat16": 30, "e4m3": 4, "e5m2": 2}
LAYOUT = ("contiguous",)


@pytest.mark.parametrize("op", CATALOG.values(), ids=CATALOG)
@pytest.mark.parametrize("answer", [torch.zeros_like, torch.ones_like], ids=["zeros", "ones"])
def test_constants_fail_every_case_that_is_not_degenerate(op, answer):
    def constant(*inputs, **options):
        outputs = Expectation(op, case, "float32").content().exact[0]
        kinds = np.int64 if op.accepts else np.float32
        return tuple(answer(torch.from_numpy(np.array(y, kinds))) for y in outputs)

    for case in op.select("full"):
        if "degenerate" not in case.tags:
            report = check(op, constant, expression=case.name, cases="full", layouts=LAYOUT)
            assert not report.passed, case


# cases with gradients that are 0 but for the roundings of float64
RESIDUES = ("one_key", "window_of_one", "one_column")


@pytest.mark.parametrize("op", CATALOG.values(), ids=CATALOG)
@pytest.mark.parametrize("dtype", LEAST_DISCRIMINATION)
def test_budgets_tell_right_from_wrong(op, dtype):
    case_best = {}
    for case in op.select("quick"):
        expectation = Expectation(op, case, dtype)
        if "degenerate" not in case.tags and not expectation.vanishes():
            results = expectation.compare(rounded_answers(expectation))
            assert all(r.passed for r in results)
            # zeros are wrong in every output that is not 0
            exact = dict(zip([r.output for r in results], chain(*expectation.content().exact)))
            weak = [r.output for r in results if (r.discrimination or 0) < 1]
            assert case.name in RESIDUES or not any(np.any(exact[name]) for name in weak), case
            found = [r.discrimination for r in results if r.discrimination is not None]
            case_best[case.name] = max(found)
    assert min(case_best.values()) >= LEAST_DISCRIMINATION[dtype], case_best


def rounded_answers(expectation):
    """The exact answers, rounded."""
    storage, name = expectation.storage, expectation.precision.results[0]
    kept = storage if storage.itemsize > 1 else DTYPES[name]

    def rounded(x):
        x = np.asarray(x)
        if x.dtype.kind in "iu":
            return Answer(x.astype(np.float64), x.dtype.name)
        return Answer(x.astype(kept).astype(np.float64), name)

    return tuple([rounded(x) for x in part] for part in expectation.content().exact)


@pytest.mark.parametrize("op", CATALOG.values(), ids=CATALOG)
def test_output_gradients_are_drawn_apart_from_the_inputs(op):
    """A kernel that takes do for q must not pass."""
    content = Expectation(op, op.select()[0], "float32").content()
    for dy in content.dys or ():
        for name in op.differentiable(content.inputs):
            x = content.inputs[name].ravel()
            n = min(x.size, dy.size)
            assert n < 2 or not np.array_equal(x[:n], dy.ravel()[:n].astype(x.dtype))


def test_an_ulp_too_much_everywhere_passes_the_rows_and_fails_the_rms():
    def one_more(x, w, b, eps=1e-5):
        bits = eager.layer_norm(x, w, b, eps).view(torch.int16)
        return (bits + 1).view(torch.bfloat16)

    report = check("layer_norm", one_more, dtypes=("bfloat16",), backward=False)
    assert {(r.case, r.kind) for r in report.failures} >= {("odd_row", "rms"), ("offset_64", "rms")}


@pytest.mark.parametrize("dtype", [np.float16, np.float32, DTYPES["bfloat16"]])
def test_ulp_is_the_spacing_of_the_dtype(dtype):
    x = np.array([1.0, 1.5, 2.0, -3.0, 1000.0, 0.1, 2.0**-14, 2.0**-130, 0.0]).astype(dtype)
    if dtype == np.float16:
        x = x[:-2]
    above = np.nextafter(np.abs(x), np.array(np.inf, dtype))
    spacing = above.astype(np.float64) - np.abs(x).astype(np.float64)
    np.testing.assert_array_equal(ulp(x.astype(np.float64), dtype), spacing)
    assert ulp(np.zeros(1), dtype) == ulp(np.full(1, 1e-300), dtype)


def test_a_row_that_is_exactly_zero_must_be():
    def leaking(*inputs, **options):
        return eager.attention(*inputs, **options) + 1e-30

    report = check(
        "attention", leaking, expression="unseeing_queries", backward=False, layouts=LAYOUT
    )
    assert [(r.case, r.output, r.want) for r in report.failures] == [("unseeing_queries", "o", 0.0)]


def rope(x):
    """Rotary positions on pairs (x[2i], x[2i+1])."""
    T, D = x.shape[-2:]
    angle = np.arange(T)[:, None] / 100.0 ** (np.arange(0, D, 2) / D)
    cos, sin = np.cos(angle), np.sin(angle)
    even, odd = x[..., ::2], x[..., 1::2]
    return np.stack([even * cos - odd * sin, even * sin + odd * cos], -1).reshape(x.shape)


def torch_rope(x, sign=1):
    T, D = x.shape[-2:]
    angle = torch.arange(T)[:, None] / 100.0 ** (torch.arange(0, D, 2) / D)
    cos, sin = angle.cos(), sign * angle.sin()
    even, odd = x.float()[..., ::2], x.float()[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).reshape(x.shape).to(x)


def test_an_op_from_outside_needs_a_formula_and_a_case():
    op = Op(
        "rope", reference=rope, inputs={"x": "B H T D"}, cases=[Case("odd", B=1, H=2, T=7, D=10)]
    )
    dtypes = ("float32", "float16", "bfloat16")
    right = check(op, torch_rope, dtypes=dtypes)
    assert right.passed, right.failures
    assert {r.output for r in right.results} == {"y", "dx"}
    wrong = check(op, lambda x: torch_rope(x, -1), dtypes=dtypes)
    assert {(r.dtype, r.output) for r in wrong.failures} == {
        (d, o) for d in dtypes for o in ("y", "dx")
    }


def test_numpy_candidates_bring_their_gradient():
    op = Op("scale", reference=lambda x, factor=2.0: x * factor, inputs={"x": Input("M N")},
            cases=[Case("odd", M=3, N=5), Case("three", M=3, N=5, factor=3.0)])  # fmt: skip

    def double(x, factor=2.0):
        return x * x.dtype.type(factor)

    def wrong_gradient(dy, x, factor=2.0):
        return (np.asarray(dy * 2, np.float32),)

    def gradient(dy, x, factor=2.0):
        return (np.asarray(dy * factor, np.float32),)

    assert check(op, double, framework="numpy", backward=gradient).passed
    failures = check(
        op, double, framework="numpy", backward=wrong_gradient, layouts=LAYOUT
    ).failures
    assert [(r.case, r.output) for r in failures] == [("three", "dx")]


@pytest.mark.parametrize(
    ("fn", "kind", "hint"),
    [
        (lambda x, w, b, eps=1e-5: 1 / 0, "exception", "ZeroDivisionError"),
        (lambda x, w, b, eps=1e-5: exit(3), "exception", "SystemExit"),
        (lambda x, w, b, eps=1e-5: 3.0, "form", "returned float"),
        (lambda x, w, b, eps=1e-5: x[:1], "shape", "must have shape"),
        (lambda x, w, b, eps=1e-5: x.double() * w.double(), "dtype", "must be float32"),
        (lambda x, w, b, eps=1e-5: (x, x), "form", "returned 2"),
        (lambda x, w, b, eps=1e-5: x * math.nan, "nonfinite", ""),
    ],
    ids=["raises", "exits", "no tensor", "shape", "dtype", "too many", "nan"],
)
def test_a_candidate_that_breaks_is_a_failure_and_the_run_goes_on(fn, kind, hint):
    report = check("layer_norm", fn, backward=False)
    cases = {case.name for case in CATALOG["layer_norm"].select()}
    assert {r.case for r in report.failures if r.kind == kind and hint in r.hint} >= cases - {
        "one_row"
    }


def test_the_forward_alone_is_checked_when_asked():
    report = check("ffn", lambda *a, **o: eager.ffn(*a, **o).detach(), backward=False)
    assert report.passed
    assert {r.output for r in report.results} == {"y"}


def test_an_output_without_a_gradient_path_has_zero_gradients():
    report = check("ffn", lambda *a, **o: eager.ffn(*a, **o).detach())
    gradients = {"dx", "dw1", "db1", "dw2", "db2", "dresidual"}
    assert {r.output for r in report.failures} == gradients


def test_what_a_function_does_not_declare_is_not_checked():
    def without_lse(q, k, v, causal=False, align="bottom_right", scale=None):
        return eager.attention(q, k, v, causal=causal, align=align, scale=scale)

    masks = "not (window or lengths or cu_seqlens or grouped or cosine)"
    report = check("attention", without_lse, backward=False, expression=masks)
    assert report.passed
    undeclared = [line.split(":")[0] for line in report.not_checked if "declare" in line]
    returned = ["lse", "lse_unseeing_queries", "unseeing_nan"]
    assert undeclared == [*returned, "dropout", "dropout_other_seed"]
    report = check("attention", eager.attention, backward=False, expression=masks)
    assert not [line for line in report.not_checked if "declare" in line]


@pytest.mark.parametrize("wrap", [lambda fn: fn, lambda fn: lambda *x, **o: fn(*x, **o)])
def test_what_a_candidate_does_not_take_is_not_checked(wrap):
    """Said by its signature, or by the function that it hands its options on to."""

    def plain(q, k, v, *, causal=False, window=None, scale=None):
        return eager.attention(q, k, v, causal=causal, window=window, scale=scale)

    names = ("stride_merged", "cosine_plain", "cosine_grouped", "window_of_one", "dropout")
    report = check(
        "attention", wrap(plain), expression=" or ".join(names),
        backward=False, layouts=LAYOUT,
    )  # fmt: skip
    assert report.passed
    assert {r.case for r in report.results} == {"window_of_one"}
    for case, name in (
        ("stride_merged", "stride"),
        ("cosine_plain", "score"),
        ("dropout", "dropout"),
    ):
        assert f"{case}: the candidate does not declare {name}" in report.not_checked
    undeclared = [line for line in report.not_checked if "cosine_grouped" in line]
    assert "temperature" in undeclared[0]


def test_another_unexpected_keyword_is_an_error_of_the_candidate():
    def broken(q, k, v, **options):
        return eager.attention(q, k, v, casual=True)

    assert not check("attention", broken, expression="cosine_plain", backward=False).passed


def test_gradients_by_central_differences_leave_room_for_legal_roundings():
    def softmax(x):
        e = np.exp(x - x.max(-1, keepdims=True))
        return e / e.sum(-1, keepdims=True)

    op = Op("softmax", reference=softmax, inputs={"x": "M N"}, cases=[Case("odd", M=5, N=23)])
    for seed in range(5):
        right = check(op, lambda x: x.float().softmax(-1).to(x), seed=seed)
        assert right.passed, right.failures
        wrong = check(op, lambda x: (x * 1.0001).softmax(-1), seed=seed)
        assert {r.output for r in wrong.failures} == {"y", "dx"}


def test_a_reference_that_insists_on_float64_still_judges():
    def softmax(x):
        x = np.asarray(x, np.float64)
        e = np.exp(x - x.max(-1, keepdims=True))
        return e / e.sum(-1, keepdims=True)

    op = Op("softmax", reference=softmax, inputs={"x": "M N"}, cases=[Case("odd", M=5, N=23)])
    for seed in range(5):
        right = check(op, lambda x: x.float().softmax(-1).to(x), seed=seed)
        assert right.passed, right.failures
        assert any("turns its inputs into float64" in line for line in right.not_checked)
        wrong = check(op, lambda x: (x * 1.0001).softmax(-1), seed=seed)
        assert {r.output for r in wrong.failures} == {"y", "dx"}


def test_a_case_that_overflows_every_legal_run_has_no_verdict():
    large = Case("large", M=3, N=5, values={"x": lambda x, dims, rng: x + 100})
    op = Op("lse", lambda x: np.log(np.exp(x).sum(-1)), {"x": "M N"}, [large])
    with pytest.raises(ValueError, match="must stay finite where the result is"):
        check(op, lambda x: torch.zeros(3), backward=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(op="norm"), "op must be one of"),
        (dict(dtypes=("float64",)), "dtype must be one of"),
        (dict(device="tpu"), "device must be one that torch can use here"),
        (dict(device="cuda:99"), "device must be one that torch can use here"),
        (dict(device="meta"), "device must be one that torch can use here"),
        (dict(expression="odd ( )"), "must join words"),
        (dict(cases="some"), "cases must be quick or full"),
        (dict(expression="windowed"), "selects none"),
        (dict(expression="and and"), "must join words"),
        (dict(layouts=("spiral",)), "layout must be one of"),
        (dict(framework="mxnet"), "framework must be torch or numpy or jax"),
    ],
)
def test_a_check_that_cannot_be_made_says_why(arguments, message):
    with pytest.raises(ValueError, match=message):
        check(**{"op": "ffn", "fn": eager.ffn, **arguments})


def test_expressions_select_by_name_option_and_tag():
    op = CATALOG["attention"]
    names = {c.name for c in op.select(expression="causal and not (lse or top_left)")}
    assert "causal" in names
    assert not names & {"full", "lse", "top_left"}
    assert {c.name for c in op.select(expression="return_lse and not lengths")} == {
        "lse", "lse_unseeing_queries", "unseeing_nan", "stride_unseeing",
    }  # fmt: skip


def test_the_command_line_answers_yes_no_and_cannot_tell(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import torch.nn.functional as F\n"
        "from gaugeblock.kernels import eager\n"
        "def good(x, w, b, eps=1e-5): return eager.layer_norm(x, w, b, eps)\n"
        "def bad(x, w, b, eps=1e-5): return eager.layer_norm(x, w, b, 2 * eps)\n"
    )
    yes = gaugeblock(
        "check", "layer_norm", "mine:good", "--dtype", "bfloat16", "--json", "out.json",
        cwd=tmp_path,
    )  # fmt: skip
    assert yes.returncode == 0, yes.stdout + yes.stderr
    saved = json.loads((tmp_path / "out.json").read_text())
    assert saved["passed"]
    assert {"op", "case", "dtype", "layout", "output", "index", "got", "want", "error", "budget",
            "kind", "hint"} <= set(saved["results"][0])  # fmt: skip
    no = gaugeblock("check", "layer_norm", "mine:bad", cwd=tmp_path)
    assert no.returncode == 1
    assert "wrong layer_norm eps float32 contiguous: y" in no.stdout.replace("\n", " ")
    (tmp_path / "leaves.py").write_text("import sys; sys.exit(0)")
    (tmp_path / "broken.py").write_text("def f(:")
    (tmp_path / "marked.py").write_text("def f(*a, **o): raise ValueError('no file [/usr/lib]')")
    marked = gaugeblock("check", "layer_norm", "marked:f", cwd=tmp_path)
    assert marked.returncode == 1
    assert "no file [/usr/lib]" in marked.stdout
    for arguments in (
        ("layer_norm", "leaves:f"),
        ("layer_norm", "broken:f"),
        ("layer_norm", "mine:good", "--json", "out.txt"),
        ("layer_norm", "mine:good", "--device", "meta"),
        ("layer_norm", "mine:absent"), ("layer_norm", "nowhere:f"), ("layer_norm", "mine"),
        ("norm", "mine:good"), ("layer_norm", "mine:good", "--dtype", "int8"),
    ):  # fmt: skip
        cannot = gaugeblock("check", *arguments, cwd=tmp_path)
        assert cannot.returncode == 2, arguments
        assert cannot.stderr.startswith("gaugeblock: ")
        assert cannot.stderr.count("\n") == 1
