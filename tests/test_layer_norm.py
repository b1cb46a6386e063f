"""What holds for layer_norm and residual_layer_norm beside parity: tables, rows, widths, bits."""

import functools

import numpy as np
import pytest
import torch
from gaugeblock.kernels import _configurations
from gaugeblock.kernels._launch import LAUNCHES
from gaugeblock.kernels._layer_norm import launchers
from gaugeblock.kernels.candidates import layer_norm as candidates
from gaugeblock.kernels.candidates import residual_layer_norm as residual_candidates
from gaugeblock.reference.catalog import CATALOG
from gaugeblock.reference.oracle import Case
from gaugeblock.reference.oracle.adapters import TorchAdapter
from gaugeblock.reference.oracle.expectation import Expectation
from gaugeblock.reference.oracle.result import describe

from gaugeblock import kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OPS = ("layer_norm", "residual_layer_norm")
# the programs that walk rows are so few here that a handful of rows makes each walk several tiles
FEW_PROGRAMS = 2
MODULES = [*zip(OPS, (candidates, residual_candidates))]


def random(*shape, seed=0, dtype=torch.float32):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=draw).to(dtype).to(DEVICE)


def inputs_of(op, M, N, dtype=torch.float32):
    """Leaves x(, r), w, b, and the gradients of the outputs."""
    terms = [random(M, N, seed=i, dtype=dtype) for i in range(len(op.split("_")) - 1)]
    leaves = [*terms, random(N, seed=7, dtype=dtype), random(N, seed=8, dtype=dtype)]
    return [x.requires_grad_() for x in leaves], [
        random(M, N, seed=9 + i, dtype=dtype) for i in range(len(terms))
    ]


def outputs(op, leaves):
    y = getattr(kernels, op)(*leaves, impl="triton")
    return y if isinstance(y, tuple) else (y,)


def everything(op, leaves, dys):
    """Outputs and gradients."""
    ys = outputs(op, leaves)
    return [*ys, *torch.autograd.grad(ys, leaves, dys)]


def rows_at(op, architecture, bits, N):
    """The table's rows at a width, as the launchers choose them."""
    dtype = torch.float32 if bits == 32 else torch.bfloat16
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launchers, "architecture", lambda: architecture)
        kernels_of = ["forward", "dx", "dwdb"]
        dx = launchers.configuration(op, "dx", N, dtype)
        kernels_of += ["columns"] if dx["BLOCK_N"] < N else []
        chosen = {k: launchers.configuration(op, k, N, dtype)["width"] for k in kernels_of}
    key = {"architecture": architecture, "bits": bits}
    return [
        row
        for row in _configurations.rows(op)
        if key.items() <= row.items() and chosen.get(row["kernel"]) == row["width"]
    ]


def launched(rows):
    """How rows launch, the number of programs apart, which the tests set."""
    return [{k: v for k, v in r.items() if k not in ("architecture", "PROGRAMS")} for r in rows]


# one column into each class, so that no tile is covered evenly; what sm_80 launches like sm_90 once
TABLE = [
    (op, architecture, bits, 1 + below)
    for op in OPS
    for bits in (16, 32)
    for below in (0, 64, 256, 1024, 2048, 4096, 8192, 16384)
    for architecture in ("sm_90", "sm_80")
    if architecture == "sm_90"
    or launched(rows_at(op, "sm_80", bits, 1 + below))
    != launched(rows_at(op, "sm_90", bits, 1 + below))
]


@pytest.mark.parametrize(("op", "architecture", "bits", "N"), TABLE)
def test_every_configuration_of_the_table(op, architecture, bits, N, monkeypatch):
    monkeypatch.setattr(launchers, "architecture", lambda: architecture)
    rows = rows_at(op, architecture, bits, N)
    used = []
    find = launchers.find

    def few_programs(name, **key):
        used.append(find(name, **key))
        return used[-1] | {"PROGRAMS": used[-1]["PROGRAMS"] and FEW_PROGRAMS}

    monkeypatch.setattr(launchers, "find", few_programs)
    M = 2 if N > 8192 else 2 * FEW_PROGRAMS * max(r["BLOCK_M"] for r in rows[:2]) + 1
    dtype = "float32" if bits == 32 else "bfloat16"
    fn = functools.partial(getattr(kernels, op), impl="triton")
    case = Case("configuration", M=M, N=N)
    results = Expectation(CATALOG[op], case, dtype).judge(TorchAdapter(DEVICE), fn)
    assert not [describe(r) for r in results if not r.passed]
    assert all(row in used for row in rows) and all(row in rows for row in used)


@pytest.mark.parametrize("op", OPS)
def test_every_row_of_the_table_is_met_above(op):
    met = [r for o, _, bits, N in TABLE if o == op for r in rows_at(op, "sm_90", bits, N)]
    met += [r for o, a, bits, N in TABLE if o == op for r in rows_at(op, a, bits, N)]
    table = _configurations.rows(op)
    assert all(row in met for row in table if row["architecture"] == "sm_90")
    others = launched(row for row in table if row["architecture"] == "sm_80")
    assert all(launch in launched(met) for launch in others)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_of_columns_walk_all_rows(dtype, monkeypatch):
    """Rows of several tiles, as no wide case has: here of narrow rows."""
    find = launchers.find
    monkeypatch.setattr(launchers, "find", lambda op, **key: find(op, **key) | {"PROGRAMS": 4})
    row = launchers.configuration("layer_norm", "columns", 300, dtype)
    M, N = 3 * row["BLOCK_M"] + 5, row["BLOCK_N"] + 3
    x, dy = random(M, N, dtype=dtype), random(M, N, seed=1, dtype=dtype)
    w = torch.ones_like(x[0])
    _, _, mean, rstd = launchers.forward("layer_norm", x, None, w, w, 1e-5)
    dw_part, db_part = launchers._column_parts("layer_norm", dy, x, mean, rstd)
    assert len(dw_part) == 2
    dw, db = launchers._added("layer_norm", dw_part, db_part, w.float())
    xhat = torch.nn.functional.layer_norm(x.double(), (N,))
    torch.testing.assert_close(dw.double(), (dy.double() * xhat).sum(0), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(db.double(), dy.double().sum(0), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("N", [20, 200, 770, 8200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bits_of_a_row_depend_on_no_other_row(op, N, dtype):
    M = 19 if N < 1000 else 3
    leaves, dys = inputs_of(op, M, N, dtype)
    per_row = len(leaves) - 2
    whole = everything(op, leaves, dys)
    for some in (slice(M - 1, M), slice(1, M, 2)):
        part = [x.detach()[some].requires_grad_() for x in leaves[:-2]] + leaves[-2:]
        found = everything(op, part, [dy[some] for dy in dys])
        for one, all_rows in zip(found[: 2 * per_row], whole[: 2 * per_row]):
            assert torch.equal(one, all_rows[some])


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("N", [5, 300, 16_400])
def test_what_rounding_left_of_a_far_mean_is_in_no_deviation(op, N):
    """Neither in the variance nor in the centre: the mean is far from a float32 here."""
    leaves, dys = inputs_of(op, 3, N)
    with torch.no_grad():
        leaves[0] += 2**22
        for r in leaves[1:-2]:
            r.zero_()
    exact = [x.detach().double().requires_grad_() for x in leaves]
    want = torch.nn.functional.layer_norm(exact[0], (N,), *exact[-2:])
    dx, dw, _ = torch.autograd.grad(want, (exact[0], *exact[-2:]), dys[0].double())
    y = outputs(op, leaves)[0]
    found = torch.autograd.grad(y, (leaves[0], leaves[-2]), dys[0])
    for x, truth in zip((y, *found), (want, dx, dw), strict=True):
        torch.testing.assert_close(x.double(), truth, rtol=0, atol=2e-5)


@pytest.mark.parametrize("op", OPS)
def test_a_row_of_nan_stays_alone(op):
    leaves, dys = inputs_of(op, 5, 70)
    clean = everything(op, leaves, dys)
    with torch.no_grad():
        leaves[0][2] = float("nan")
    found = everything(op, leaves, dys)
    per_row = len(leaves) - 2
    others = [0, 1, 3, 4]
    for x, want in zip(found[: 2 * per_row], clean[: 2 * per_row]):
        assert x[2].isnan().all()
        assert torch.equal(x[others], want[others])


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("N", [1, 2, 16, 1023, 65_536])
def test_widths(op, N):
    M = 1 if N > 5000 else 3
    leaves, dys = inputs_of(op, M, N)
    found = everything(op, leaves, dys)
    exact = [x.detach().cpu().double().numpy() for x in leaves]
    from gaugeblock import reference

    y, cache = getattr(reference, op)(*exact)
    given = [dy.cpu().double().numpy() for dy in dys]
    backward = getattr(reference, f"{op}_backward")
    gradients = backward(given[0] if len(given) == 1 else tuple(given), cache)
    for x, want in zip(found, [*(y if isinstance(y, tuple) else (y,)), *gradients], strict=True):
        # roundings of float32 sums of N terms of size 1
        np.testing.assert_allclose(x.detach().cpu().numpy(), want, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("op", OPS)
def test_a_wider_row_is_refused(op):
    leaves, _ = inputs_of(op, 1, 65_537)
    with pytest.raises(ValueError, match=f"{op}: N must be at most 65536, got 65537; use impl="):
        outputs(op, leaves)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(("M", "N"), [(37, 300), (5, 8200)])
def test_repeats_are_bitwise_equal(op, M, N):
    leaves, dys = inputs_of(op, M, N, torch.float16)
    first = everything(op, leaves, dys)
    for x, again in zip(first, everything(op, leaves, dys)):
        assert torch.equal(x, again)


def test_the_sum_is_not_rounded_before_it_is_normalised():
    x, r = random(4, 96, dtype=torch.bfloat16), random(4, 96, seed=1, dtype=torch.bfloat16) + 64
    w, b = torch.ones_like(x[0]), torch.zeros_like(x[0])
    y, h = kernels.residual_layer_norm(x, r, w, b, impl="triton")
    assert torch.equal(h, x + r)
    exact = x.double() + r.double()
    rounded, unrounded = (
        (t - t.mean(-1, keepdim=True)) / t.std(-1, correction=0, keepdim=True)
        for t in (h.double(), exact)
    )
    assert (y - unrounded).abs().max() < 0.1 * (rounded - unrounded).abs().max()


def test_the_gradient_of_h_alone_and_of_y_alone():
    """An output that nobody used costs neither zeros nor a launch."""
    leaves, (dy, dh) = inputs_of("residual_layer_norm", 5, 40)
    y, h = outputs("residual_layer_norm", leaves)
    LAUNCHES.clear()
    gradients = torch.autograd.grad(h, leaves, dh, retain_graph=True, allow_unused=True)
    assert not LAUNCHES
    assert gradients[2] is None and gradients[3] is None
    assert torch.equal(gradients[0], dh) and torch.equal(gradients[1], dh)
    alone = torch.autograd.grad(y, leaves, dy, retain_graph=True)
    both = torch.autograd.grad((y, h), leaves, (dy, torch.zeros_like(dh)))
    for x, want in zip(alone, both):
        assert torch.equal(x, want)


@pytest.mark.parametrize("shape", [(5, 40), (2, 3, 40)])
def test_dx_and_dr_are_written_once_and_accumulate_apart(shape):
    x, r, dy, dh = (random(*shape, seed=i) for i in range(4))
    leaves = [x.requires_grad_(), r.requires_grad_(), random(40), random(40, seed=5)]
    ys = outputs("residual_layer_norm", leaves)
    dx, dr = torch.autograd.grad(ys, leaves[:2], (dy, dh))
    assert dx.data_ptr() == dr.data_ptr()
    for _ in range(2):
        torch.autograd.backward(outputs("residual_layer_norm", leaves), (dy, dh))
    # twice the same is exact; a buffer that both shared would hold more
    assert torch.equal(x.grad, 2 * dx) and torch.equal(r.grad, 2 * dx)


def test_each_tensor_has_strides_of_its_own():
    (x, r, w, b), (dy, dh) = inputs_of("residual_layer_norm", 5, 40)
    want = everything("residual_layer_norm", (x, r, w, b), (dy, dh))
    for i in range(4):
        some = [x.detach(), r.detach(), dy, dh]
        some[i] = some[i].t().contiguous().t()
        leaves = [x.requires_grad_() for x in some[:2]] + [w, b]
        found = everything("residual_layer_norm", leaves, some[2:])
        assert all(map(torch.equal, found, want))


def test_both_ops_agree():
    """The kernels are the same ones: with r = 0, their bits."""
    (x, w, b), (dy,) = inputs_of("layer_norm", 9, 300)
    want = everything("layer_norm", (x, w, b), (dy,))
    y, h = kernels.residual_layer_norm(x, torch.zeros_like(x), w, b, impl="triton")
    found = [y, *torch.autograd.grad(y, (x, w, b), dy)]
    assert torch.equal(h, x)
    for one, other in zip(found, want, strict=True):
        assert torch.equal(one, other)


def test_launches():
    """Two kernels a backward, three for rows too wide for registers; one a forward."""
    for N, backward in ((300, ["dx"]), (8200, ["dx_wide", "columns"])):
        leaves, dys = inputs_of("layer_norm", 3, N)
        LAUNCHES.clear()
        everything("layer_norm", leaves, dys)
        names = ["fwd", *(f"bwd_{name}" for name in [*backward, "dwdb"])]
        assert {f"_layer_norm_{name}_kernel": 1 for name in names} == LAUNCHES


def test_gradcheck_of_the_residual_form_in_float64():
    draw = torch.Generator().manual_seed(0)
    leaves = [
        torch.randn(s, generator=draw, dtype=torch.float64).to(DEVICE).requires_grad_()
        for s in ((3, 5), (3, 5), (5,), (5,))
    ]
    fn = functools.partial(kernels.residual_layer_norm, impl="triton")
    assert torch.autograd.gradcheck(fn, leaves)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("N", [1, 5, 300, 8200])
def test_float64_is_float64_throughout(op, N):
    """Gradcheck would let a float32 step through. eps is one that float32 holds."""
    leaves, dys = inputs_of(op, 3, N, torch.float64)
    results = []
    for impl in ("triton", "eager"):
        ys = getattr(kernels, op)(*leaves, eps=2.0**-17, impl=impl)
        ys = ys if isinstance(ys, tuple) else (ys,)
        results.append([*ys, *torch.autograd.grad(ys, leaves, dys)])
    for x, want in zip(*results, strict=True):
        torch.testing.assert_close(x, want, rtol=0, atol=1e-13)


@pytest.mark.parametrize("op", OPS)
def test_the_table_covers_every_width(op):
    rows = _configurations.rows(op)
    for architecture in ("sm_80", "sm_90"):
        for bits in (16, 32):
            mine = [r for r in rows if (r["architecture"], r["bits"]) == (architecture, bits)]
            for kernel in ("forward", "dx", "columns", "dwdb"):
                widths = [row["width"] for row in mine if row["kernel"] == kernel]
                assert len(set(widths)) == len(widths)
                assert max(widths) == launchers.LARGEST_ROW
            for row in mine:
                for name in ("BLOCK_M", "BLOCK_N", "num_warps"):
                    assert row[name].bit_count() == 1
                walks = row["kernel"] == "columns" or (
                    row["kernel"] == "dx" and row["BLOCK_N"] >= row["width"]
                )
                assert (row["PROGRAMS"] is not None) == walks


def test_the_table_is_chosen_by_width_and_dtype(monkeypatch):
    monkeypatch.setattr(launchers, "architecture", lambda: "sm_80")
    for N, width in ((1, 64), (64, 64), (65, 256), (768, 1024), (1025, 2048), (16385, 65536)):
        for dtype, bits in ((torch.bfloat16, 16), (torch.float32, 32), (torch.float64, 32)):
            row = launchers.configuration("layer_norm", "forward", N, dtype)
            assert (row["width"], row["bits"], row["architecture"]) == (width, bits, "sm_80")
            assert row["BLOCK_N"] >= N or row["width"] == 65536
            assert row["num_stages"] == 1 or dtype != torch.float64


@pytest.mark.parametrize(("op", "module"), MODULES)
def test_what_tune_tries(op, module):
    for row in _configurations.rows(op):
        own, *others = module.candidates(row)
        assert own == {name: row[name] for name in module.LAUNCH}
        assert own not in others
        assert 3 <= len(others) <= 60
        assert all(tuple(other) == module.LAUNCH for other in others)


@pytest.mark.parametrize(("op", "module"), MODULES)
@pytest.mark.parametrize("kernel", ["forward", "dx"])
def test_tunes_problem_is_the_kernels_and_its_twin(op, module, kernel):
    """Where a candidate must be right, its own launch is what runs."""
    table = _configurations.rows(op)
    key = {"kernel": kernel, "architecture": "sm_90", "bits": 16, "width": 64}
    row = next(row for row in table if key.items() <= row.items())
    candidate = {name: row[name] for name in module.LAUNCH} | {"PROGRAMS": row["PROGRAMS"] and 2}

    def choose(asked):
        found = next(row for row in table if asked.items() <= row.items())
        return found | candidate if found is row else found

    with _configurations.trial(op, choose):
        problem = module.problem(row, torch.float32, DEVICE, candidate)
        answers = problem.answers()
        LAUNCHES.clear()
        problem.timed()
    assert set(LAUNCHES) == (
        {"_layer_norm_fwd_kernel"}
        if kernel == "forward"
        else {"_layer_norm_bwd_dx_kernel", "_layer_norm_bwd_dwdb_kernel"}
    )
    exact = problem.twin(*(x.double() for x in problem.inputs))
    assert len(problem.names) == len(answers)
    for x, want in zip(answers, exact, strict=True):
        torch.testing.assert_close(x.double(), want, rtol=1e-5, atol=1e-4)
