"""What holds for adamw beside parity: lists, clipping, master weights, launches, bits, errors."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from gaugeblock.kernels import _adamw as module
from gaugeblock.kernels import _configurations
from gaugeblock.kernels._adamw import launchers
from gaugeblock.kernels._launch import LAUNCHES
from gaugeblock.kernels.candidates import adamw as tuning

from gaugeblock import kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IMPLS = ("triton", "eager")
STEP = dict(step=3, lr=0.1, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1)
# of a chunk of 4,096: within one, its edges, none, one more than two
SIZES = (1, 3, 77, 0, 4095, 4096, 4097, 9000)
# a few roundings of float32, or the last one of the storage
CLOSE = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}


def states(sizes, dtype=torch.float32, state_dtype=None, seed=0):
    """Lists p, g, m, v of tensors with these sizes or shapes."""
    draw = torch.Generator().manual_seed(seed)
    shapes = [size if isinstance(size, tuple) else (size,) for size in sizes]
    p, g, m, v = (
        [torch.randn(shape, generator=draw).to(dtype).to(DEVICE) for shape in shapes]
        for _ in range(4)
    )
    state_dtype = state_dtype or dtype
    return p, g, [x.to(state_dtype) for x in m], [x.square().to(state_dtype) for x in v]


def copies(lists):
    return [[x.clone() for x in tensors] for tensors in lists]


def expected(lists, *, norm=None, max_norm=None, **options):
    """p, m and v after the step, in float64, from the formula."""
    options = STEP | options
    every = [x if isinstance(x, list) else [x] * len(lists[0]) for x in options.values()]
    factor = 1.0 if max_norm is None else min(1.0, max_norm / (norm + 1e-6))
    out = [], [], []
    for tensors, (t, lr, beta1, beta2, eps, decay) in zip(zip(*lists), zip(*every)):
        p, g, m, v = (x.double() for x in tensors)
        m = beta1 * m + (1 - beta1) * factor * g
        v = beta2 * v + (1 - beta2) * (factor * g) ** 2
        root = (v / (1 - beta2**t)).sqrt() + eps
        p = p * (1 - lr * decay) - lr * m / (1 - beta1**t) / root
        for tensors, x in zip(out, (p, m, v)):
            tensors.append(x)
    return out


def norm_of(g):
    return math.sqrt(sum(x.double().square().sum().item() for x in g))


def assert_step(lists, want, rtol=None):
    p, _, m, v = lists
    for got, exact in zip((p, m, v), want):
        for x, y in zip(got, exact, strict=True):
            near = rtol or CLOSE[x.dtype]
            torch.testing.assert_close(x.double(), y, rtol=near, atol=near)


@pytest.mark.parametrize("max_norm", [None, 1.0, 1e6])
@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize("impl", IMPLS)
def test_a_list(impl, dtype, max_norm):
    lists = states(SIZES, dtype)
    kept, exact = copies(lists), norm_of(lists[1])
    want = expected(lists, norm=exact, max_norm=max_norm)
    norm = kernels.adamw(*lists, **STEP, max_norm=max_norm, impl=impl)
    assert_step(lists, want)
    assert all(map(torch.equal, lists[1], kept[1]))
    if max_norm is None:
        assert norm is None
    else:
        assert norm.shape == () and norm.dtype == torch.float32
        assert norm.item() == pytest.approx(exact, rel=1e-6)


def test_a_list_has_the_bits_of_its_tensors_alone():
    lists = states(SIZES, torch.bfloat16)
    alone = copies(lists)
    kernels.adamw(*lists, **STEP, impl="triton")
    for tensors in zip(*alone):
        kernels.adamw(*tensors, **STEP, impl="triton")
    assert all(map(torch.equal, itertools.chain(*lists), itertools.chain(*alone)))


@pytest.mark.parametrize("impl", IMPLS)
def test_clipping_is_torchs(impl):
    """Step for step, by gradients that are clipped and others that are not."""
    p, _, m, v = states((50, 4500, 7))
    ours, m, v = [x.clone() for x in p], [x * 0 for x in m], [x * 0 for x in v]
    theirs = [x.clone().requires_grad_() for x in p]
    adamw = torch.optim.AdamW(theirs, lr=0.1, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    clipped = []
    for step in range(1, 6):
        _, g, _, _ = states((50, 4500, 7), seed=step)
        for x, grad in zip(theirs, g):
            x.grad = grad / 70 * step
        g = [x.grad.clone() for x in theirs]
        want = torch.nn.utils.clip_grad_norm_(theirs, 2.5)
        adamw.step()
        options = {**STEP, "step": step}
        norm = kernels.adamw(ours, g, m, v, **options, max_norm=2.5, impl=impl)
        torch.testing.assert_close(norm, want, rtol=1e-6, atol=0)
        clipped.append(want.item() > 2.5)
        for x, y in zip(ours, theirs):
            torch.testing.assert_close(x, y.detach(), rtol=1e-6, atol=1e-6)
    assert any(clipped) and not all(clipped)


def test_many_tensors_are_three_launches():
    lists = states([1 + 7 * i % 50 for i in range(150)])
    want = expected(lists, norm=norm_of(lists[1]), max_norm=1.0)
    LAUNCHES.clear()
    kernels.adamw(*lists, **STEP, max_norm=1.0, impl="triton")
    # allocations lie at aligned addresses
    assert LAUNCHES == {
        "_adamw_squares_list_kernel": 1, "_adamw_norm_kernel": 1, "_adamw_list_kernel": 1
    }  # fmt: skip
    assert_step(lists, want)
    LAUNCHES.clear()
    kernels.adamw(*lists, **STEP, impl="triton")
    assert LAUNCHES == {"_adamw_list_kernel": 1}


@pytest.mark.parametrize("programs", [1, 2])
def test_programs_that_walk_several_chunks(programs, monkeypatch):
    monkeypatch.setattr(launchers, "SQUARES_PROGRAMS", programs)
    for sizes in ((30_000,), (20_000, 5, 9000)):
        lists = states(sizes)
        exact = norm_of(lists[1])
        norm = kernels.adamw(*lists, **STEP, max_norm=1.0, impl="triton")
        assert norm.item() == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_mixed_dtypes(impl):
    sizes = (9, 5000, 80)
    parts = [
        states(sizes), states(sizes, torch.bfloat16, seed=1), states(sizes, torch.float16, seed=2),
        states(sizes, torch.bfloat16, torch.float32, seed=3),
    ]  # fmt: skip
    # dtypes taken turn about
    lists = [[x for together in zip(*tensors) for x in together] for tensors in zip(*parts)]
    want = expected(lists, norm=norm_of(lists[1]), max_norm=3.0)
    LAUNCHES.clear()
    kernels.adamw(*lists, **STEP, max_norm=3.0, impl=impl)
    assert_step(lists, want)
    assert LAUNCHES.total() == (2 * len(parts) + 1 if impl == "triton" else 0)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_master_weights_keep_what_16_bits_lose(dtype, impl):
    p, g, m, v = states((40, 5000), dtype, torch.float32)
    master = [x.float() for x in p]
    single = [master[0].clone()], [g[0].float()], [m[0].clone()], [v[0].clone()]
    before = [x.clone() for x in p]
    options = STEP | dict(lr=1e-5)
    for step in range(3, 6):
        options["step"] = step
        kernels.adamw(p, g, m, v, **options, master=master, max_norm=0.5, impl=impl)
        # the first alone, in float32: its gradients scaled as those of both
        factor = 0.5 / (norm_of(g) + 1e-6)
        want = expected([*single[:1], [single[1][0] * factor], *single[2:]], **options)
        single = *want[:1], single[1], *want[1:]
    torch.testing.assert_close(master[0].double(), single[0][0], rtol=1e-6, atol=1e-6)
    assert all(torch.equal(x, y.to(dtype)) for x, y in zip(p, master))
    assert not torch.equal(master[1], before[1].float())
    assert (p[1] == before[1]).float().mean() > 0.5
    assert m[0].dtype == v[0].dtype == master[0].dtype == torch.float32


@pytest.mark.parametrize("impl", IMPLS)
def test_some_with_master_weights(impl):
    short, single = states((40,), torch.bfloat16, torch.float32), states((50,), seed=1)
    lists = [a + b for a, b in zip(short, single)]
    master = [lists[0][0].float(), None]
    want = expected(lists)
    kernels.adamw(*lists, **STEP, master=master, impl=impl)
    assert_step(lists, want)
    torch.testing.assert_close(master[0].double(), want[0][0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_views_at_odd_addresses(impl):
    lists = states((5001, 4097, 10))
    views = [[x[1:] for x in tensors] for tensors in lists]
    # one of them aligned but for its gradient
    views[0][0], views[2][0], views[3][0] = (views[i][0].clone() for i in (0, 2, 3))
    outside = [tensors[1][0].clone() for tensors in lists]
    want = expected(views)
    kernels.adamw(*views, **STEP, impl=impl)
    assert_step(views, want)
    assert all(torch.equal(x, tensors[1][0]) for x, tensors in zip(outside, lists))


def test_nothing_is_touched_past_the_end_of_a_chunk_that_is_almost_full():
    lists = states((4096, 8192))
    kept = copies(lists)
    for own in (lists, [tensors[:1] for tensors in lists]):
        kernels.adamw(*([x[:-1] for x in tensors] for tensors in own), **STEP, impl="triton")
    for before, after in zip(itertools.chain(*kept), itertools.chain(*lists)):
        assert before[-1] == after[-1]


@pytest.mark.parametrize("impl", IMPLS)
def test_layouts(impl):
    """Transposed alike, lying otherwise, and with gaps; a list of all."""
    alike = [[x[0].mT] for x in states([(30, 40)])]
    other = states([(40, 30)], seed=1)
    other[1][0] = other[1][0].mT.contiguous().mT
    other[3][0] = other[3][0].mT.contiguous().mT
    gaps = [[x[0][:, ::2]] for x in states([(40, 60)], seed=2)]
    expanded = states([(40, 30)], seed=3)
    expanded[1][0] = expanded[1][0][:1].expand(40, 30)
    lists = [list(itertools.chain(*tensors)) for tensors in zip(alike, other, gaps, expanded)]
    assert not any(x.is_contiguous() for x in (lists[0][0], lists[1][1], lists[2][2], lists[1][3]))
    want = expected(lists)
    kernels.adamw(*lists, **STEP, impl=impl)
    assert_step(lists, want)


def test_what_lies_alike_is_not_copied(monkeypatch):
    copied = []
    copy = torch.Tensor.copy_
    monkeypatch.setattr(torch.Tensor, "copy_", lambda *x: copied.append(1) or copy(*x))
    kernels.adamw(*([x[0].mT] for x in states([(30, 40)])), **STEP, impl="triton")
    kernels.adamw(*(x[0].permute(2, 0, 1) for x in states([(2, 3, 4)])), **STEP, impl="triton")
    assert not copied
    kernels.adamw(*(x[0][::2] for x in states([(30, 40)])), **STEP, impl="triton")
    # in: p, g, m and v; out: p, m and v
    assert len(copied) == 7


@pytest.mark.parametrize("impl", IMPLS)
def test_hyperparameters_of_each_tensor(impl):
    lists = states((40, 50, 60))
    own = dict(step=[1, 5, 2**40], lr=[0.1, 0.0, 0.01], weight_decay=[0.0, 0.3, 0.1],
               beta1=[0.9, 0.0, 0.5], beta2=[0.99, 0.9, 0.0], eps=[1e-8, 0.1, 1e-3])  # fmt: skip
    want = expected(lists, **own)
    kernels.adamw(*lists, **own, impl=impl)
    assert_step(lists, want)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("impl", IMPLS)
def test_a_norm_that_is_not_finite(impl, bad):
    lists = states((40, 5000, 3), torch.bfloat16, torch.float32)
    master = [x.float() for x in lists[0]]
    lists[1][1][4500] = bad
    kept = copies([*lists, master])
    options = STEP | dict(max_norm=1.0, impl=impl, master=master)
    norm = kernels.adamw(*lists, **options, skip_nonfinite=True)
    assert not norm.isfinite()
    for before, after in zip(itertools.chain(*kept), itertools.chain(*lists, master)):
        assert torch.equal(before.nan_to_num(7.0), after.nan_to_num(7.0))
    # as torch: NaN scales every gradient, inf scales them to 0 and itself to NaN
    with np.errstate(all="ignore"):
        norm = kernels.adamw(*lists, **options)
    assert not norm.isfinite()
    assert lists[0][1][4500].isnan()
    assert lists[0][0].isnan().all() == math.isnan(bad)
    # finite again, steps are taken again
    lists, master[:] = states((40, 5000, 3), torch.bfloat16, torch.float32), kept[4]
    want = expected(lists, norm=norm_of(lists[1]), max_norm=1.0)
    kernels.adamw(*lists, **options, skip_nonfinite=True)
    assert_step(lists, want)


@pytest.mark.parametrize("impl", IMPLS)
def test_repeats_are_bitwise_equal(impl):
    runs = []
    for _ in range(3):
        lists = states(SIZES, torch.float16)
        norm = kernels.adamw(*lists, **STEP, max_norm=1.0, impl=impl)
        runs.append([norm, *itertools.chain(*lists)])
    assert all(all(map(torch.equal, runs[0], again)) for again in runs[1:])


@pytest.mark.parametrize("impl", IMPLS)
def test_nothing_to_do(impl):
    assert kernels.adamw([], [], [], [], **STEP, impl=impl) is None
    assert kernels.adamw([], [], [], [], **STEP, max_norm=1.0, impl=impl) == 0
    lists = states((0, 0))
    assert kernels.adamw(*lists, **STEP, max_norm=1.0, impl=impl) == 0


def test_bias_corrections_keep_their_digits():
    """Against exact rational numbers; float32 powers of β would leave 1 − βᵗ a digit or two."""
    for beta, step in itertools.product((0.0, 0.5, 0.9, 0.999, 0.999999), (1, 2, 17, 1000)):
        exact = 1 - Fraction(beta) ** step
        assert launchers._corrected(beta, step) == pytest.approx(float(exact), rel=1e-13)
    for step in (10**8, 2**32 + 1, 2**70):
        assert launchers._corrected(0.999, step) == 1.0
    _, rate1, _, rate2, length, root, _ = launchers.coefficients(1, 0.1, 0.9, 0.999999, 0.0, 0.0)
    assert length * rate1 == pytest.approx(0.1, rel=1e-15)
    assert root * math.sqrt(rate2) == pytest.approx(1.0, rel=1e-10)


def test_tables_are_copied_once(monkeypatch):
    copied, copy = [], launchers._copied
    monkeypatch.setattr(launchers, "_copied", lambda *a: copied.append(1) or copy(*a))
    for cached in (launchers._numbers, launchers._chunks):
        cached.cache_clear()
    lists = states((10, 5000, 30), seed=11)
    for step, new in ((1, 4), (1, 0), (2, 1)):
        copied.clear()
        kernels.adamw(*lists, **STEP | dict(step=step), max_norm=1.0, impl="triton")
        assert len(copied) == new
    # other gradients: their addresses, and nothing else
    copied.clear()
    lists[1][:] = [x.clone() for x in lists[1]]
    want = expected(lists, step=2)
    kernels.adamw(*lists, **STEP | dict(step=2), impl="triton")
    assert len(copied) == 1
    assert_step(lists, want)


def test_the_operator_is_registered_as_torch_wants_it():
    lists = states((40, 50), torch.bfloat16, torch.float32)
    master = [lists[0][0].float()]
    norm = torch.zeros((), device=DEVICE)
    every = [[x] * 2 for x in STEP.values()]
    arguments = (*lists, master, [True, False], norm, *every, 1.0, True)
    wanted = torch.library.opcheck(module._fwd_op, arguments)
    assert set(wanted.values()) == {"SUCCESS"}, wanted
    changed = [x.name for x in module._fwd_op._opoverload._schema.arguments if x.is_write]
    assert changed == ["p", "m", "v", "master", "norm"]


def test_autograd_sees_that_a_parameter_changed():
    w = torch.randn(5, device=DEVICE, requires_grad=True)
    loss = (w * w).sum()
    g, m, v = (torch.ones_like(w) for _ in range(3))
    kernels.adamw(w, g, m, v, **STEP, impl="triton")
    assert w.requires_grad and w.is_leaf
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


ROWS = _configurations.rows("adamw")


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
@pytest.mark.parametrize("bits", [16, 32])
def test_every_configuration_of_the_table(bits, architecture, monkeypatch):
    monkeypatch.setattr(_configurations, "architecture", lambda: architecture)
    rows = [r for r in ROWS if (r["bits"], r["architecture"]) == (bits, architecture)]
    assert {r["kernel"] for r in rows} == {"update", "squares"}
    longest = max(r["BLOCK_N"] * r["STEPS"] for r in rows)
    used, find = [], _configurations.find
    monkeypatch.setattr(
        _configurations, "find", lambda op, **key: used.append(find(op, **key)) or used[-1]
    )
    for sizes in ((2 * longest + 5,), (longest + 1, 3, longest)):
        lists = states(sizes, torch.float32 if bits == 32 else torch.bfloat16)
        want = expected(lists, norm=norm_of(lists[1]), max_norm=1.0)
        kernels.adamw(*lists, **STEP, max_norm=1.0, impl="triton")
        assert_step(lists, want)
    assert all(row in used for row in rows) and all(row in rows for row in used)


@pytest.mark.parametrize(
    "row", ROWS, ids=lambda r: f"{r['kernel']}-{r['architecture']}-{r['bits']}"
)
def test_what_tune_tries(row, monkeypatch):
    found = tuning.candidates(row)
    assert found[0] == {name: row[name] for name in tuning.LAUNCH}
    assert len({tuple(x.values()) for x in found}) == len(found)
    for x in found:
        assert x["BLOCK_N"].bit_count() == 1 and x["STEPS"] >= 1
        assert x["BLOCK_N"] * x["STEPS"] % 4096 == 0
    if row["architecture"] == "sm_80":
        return
    dtype = torch.float32 if row["bits"] == 32 else torch.bfloat16
    candidate = min(found, key=lambda x: x["BLOCK_N"] * x["STEPS"])
    problem = tuning.problem(row, dtype, DEVICE, candidate)
    kept = [x.clone() for x in problem.inputs]
    answers = problem.answers()
    assert len(answers) == len(problem.names)
    assert all(map(torch.equal, kept, problem.inputs))
    for got, want in zip(answers, problem.twin(*(x.double() for x in problem.inputs))):
        torch.testing.assert_close(got.double(), want, rtol=CLOSE[dtype], atol=CLOSE[dtype])


WRONG = {
    "lists_and_tensors": (dict(g=states((4,))[1][0]), TypeError, "must be all tensors or all"),
    "count": (dict(m=[]), ValueError, "m must have as many tensors as p, 2, got 0"),
    "shape": (dict(g=states((4, 4))[1]), ValueError, r"g\[1\] must have shape as p = \(5,\), got"),
    "sparse": (
        dict(g=[states((4,))[1][0].to_sparse(), states((5,))[1][0]]), TypeError,
        r"g\[0\] must be dense, got torch.sparse_coo; use .to_dense",
    ),
    "v_dtype": (
        dict(v=[x.half() for x in states((4, 5))[3]]), TypeError,
        r"v\[0\] must have p's dtype torch.float32, got torch.float16; convert it",
    ),
    "master": (
        dict(master=states((4, 5))[0]), TypeError,
        r"master\[0\] must be float32 weights of 16-bit p, got torch.float32 of torch.float32",
    ),
    "overlap": (
        dict(m=[states((4,))[2][0], torch.zeros(1, device=DEVICE).expand(5)]), ValueError,
        r"m\[1\] must have memory for every element, got stride 0; clone it",
    ),
    "step_tensor": (dict(step=torch.tensor(3)), TypeError, "step must be a number on the host"),
    "lr_tensor": (dict(lr=torch.tensor(0.1)), TypeError, "lr must be a number on the host, got"),
    "steps": (dict(step=[1]), ValueError, "step must be a number or, for lists of tensors, a list"),
    "one_step": (dict(step=[1, 0]), ValueError, "step must be at least 1, got 0"),
    "max_norm": (dict(max_norm=0.0), ValueError, "max_norm must be > 0, got 0.0"),
    "max_norm_nan": (dict(max_norm=math.nan), ValueError, "max_norm must be > 0, got nan"),
    "skip": (dict(skip_nonfinite=True), ValueError, "skip_nonfinite must come with max_norm"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("impl", IMPLS)
def test_wrong_input_is_refused_in_one_line(impl, name):
    change, kind, message = WRONG[name]
    arguments = dict(zip("pgmv", states((4, 5)))) | STEP | change
    kept = [x.clone() for x in arguments["p"]]
    with pytest.raises(kind, match=message) as raised:
        kernels.adamw(**arguments, impl=impl)
    assert str(raised.value).startswith("adamw: ") and "\n" not in str(raised.value)
    assert all(map(torch.equal, kept, arguments["p"]))


def test_a_tensor_alone_takes_no_list_of_numbers():
    with pytest.raises(ValueError, match="lr must be a number or, for lists of tensors"):
        kernels.adamw(*(x[0] for x in states((4,))), **STEP | dict(lr=[0.1]))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_nothing_waits_for_the_device():
    lists = states(SIZES)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in (1, 2):
            norm = kernels.adamw(*lists, **STEP | dict(step=step), max_norm=1.0,
                                 skip_nonfinite=True)  # fmt: skip
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert norm.isfinite()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_graph_of_a_list_is_refused():
    lists = states((4, 5))
    graph = torch.cuda.graph(torch.cuda.CUDAGraph())
    with pytest.raises(RuntimeError, match="lists must not be captured"), graph:
        kernels.adamw(*lists, **STEP)
