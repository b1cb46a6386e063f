"""What holds for sample beside parity: proportions, edges, tiles, rows, no gradient."""

import functools

import pytest
import torch
from gaugeblock.kernels import _configurations, _sample
from gaugeblock.kernels._launch import LAUNCHES
from gaugeblock.kernels.candidates import sample as tuned
from gaugeblock.reference.catalog import CATALOG
from gaugeblock.reference.oracle.adapters import TorchAdapter
from gaugeblock.reference.oracle.expectation import Expectation
from gaugeblock.reference.oracle.op import Case
from gaugeblock.reference.oracle.result import describe
from torch._subclasses.fake_tensor import FakeTensorMode

from gaugeblock import kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INF = float("inf")
sample = functools.partial(kernels.sample, impl="triton")
both = pytest.mark.parametrize("impl", ["triton", "eager"])


def normal(*shape, seed=0, dtype=torch.float32):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=draw).to(DEVICE, dtype)


def uniform(*shape, seed=1):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def evenly(count):
    """Uniform numbers in the middle of `count` equal parts of 0 … 1."""
    return (torch.arange(count, device=DEVICE) + 0.5) / count


def judged(case, dtype="float32"):
    results = Expectation(CATALOG["sample"], case, dtype).judge(TorchAdapter(DEVICE), sample)
    assert not [describe(r) for r in results if not r.passed]


def small(BLOCK_V, DIGIT):
    """Tiles so small that few tokens fill many."""

    def choose(key):
        return _configurations._find("sample", **key) | {"BLOCK_V": BLOCK_V, "DIGIT": DIGIT}

    return _configurations.trial("sample", choose)


@pytest.mark.parametrize(
    "row", _configurations.rows("sample"), ids=lambda r: f"{r['architecture']}-{r['bits']}"
)
def test_every_configuration_of_the_table(row, monkeypatch):
    monkeypatch.setattr(_sample, "architecture", lambda: row["architecture"])
    used = []
    find = _configurations.find
    monkeypatch.setattr(_sample, "find", lambda op, **key: used.append(find(op, **key)) or used[-1])
    for V, options in ((row["BLOCK_V"], {}), (2 * row["BLOCK_V"] + 1, dict(top_k=99, top_p=0.9))):
        case = Case("configuration", M=4, V=V, values={"u": lambda u, *_: u * 0 + 0.7}, **options)
        for dtype in ("float32",) if row["bits"] == 32 else ("float16", "bfloat16"):
            judged(case, dtype)
    assert used and all(found == row for found in used)


def test_a_candidate_is_right_at_a_ragged_shape():
    row = _configurations.rows("sample")[0]
    own, *others = tuned.candidates(row)
    assert own == {name: row[name] for name in tuned.LAUNCH}
    for candidate in (others[0], others[1]):
        with _configurations.trial("sample", lambda key, c=candidate: key | c):
            problem = tuned.problem(row, torch.bfloat16, DEVICE, candidate)
            (got,), (want,) = problem.answers(), problem.twin(*problem.inputs)
            assert torch.equal(got, want)


@pytest.mark.parametrize("DIGIT", [1, 2, 4])
def test_many_small_tiles(DIGIT):
    """Tokens ± 1 of a tile, and so many tiles that their masses are scanned."""
    options = dict(top_k=20, top_p=0.8, min_p=0.05, temperature=1.3)
    with small(16, DIGIT):
        for V, some in ((15, {}), (17, options), (33, {}), (70, options)):
            judged(Case("tiles", M=2, V=V, values={"u": lambda u, d, r: r.random(u.shape)}, **some))


@both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_tokens_come_in_the_proportions_of_the_softmax(impl, dtype):
    p = torch.tensor([1, 16, 0, 2, 1, 8, 4], device=DEVICE) / 32
    logits = p.log().to(dtype).expand(32, 7)
    run = functools.partial(kernels.sample, logits, evenly(32), impl=impl)

    def counts(**options):
        return run(**options).bincount(minlength=7).tolist()

    assert counts() == [1, 16, 0, 2, 1, 8, 4]
    # in the order of their indices
    assert (run().diff() >= 0).all()
    assert counts(temperature=0) == [0, 32, 0, 0, 0, 0, 0]
    assert counts(top_k=1) == [0, 32, 0, 0, 0, 0, 0]
    # 16 and 8 of 24
    assert counts(top_k=2) == counts(top_p=0.6) == counts(min_p=0.4) == [0, 21, 0, 0, 0, 11, 0]
    assert counts(top_k=7) == counts(top_p=1.0) == counts(min_p=0.0) == counts()
    # the filters see what those before them have left: 16 of 28 reach a half, as 8 do of 16
    assert counts(top_k=3, top_p=0.5) == [0, 32, 0, 0, 0, 0, 0]
    assert counts(top_k=3, top_p=0.6) == [0, 21, 0, 0, 0, 11, 0]


@both
def test_equals_of_the_last_one_kept_stay(impl):
    logits = torch.tensor([2.0, -0.0, 1.0, 0.0, -1.0, 0.0], device=DEVICE).expand(40, 6)
    u = evenly(40)
    seen = kernels.sample(logits, u, top_k=3, impl=impl)
    assert set(seen.tolist()) == {0, 1, 2, 3, 5}
    ties = torch.tensor([1.0, 3.0, 3.0, 0.0], device=DEVICE).expand(5, 4)
    assert kernels.sample(ties, evenly(5), temperature=0, impl=impl).tolist() == [1] * 5


@both
def test_greedy_takes_the_first_of_equals_in_different_tiles(impl):
    logits = torch.zeros(3, 50, device=DEVICE)
    for row, (first, other) in enumerate(((3, 19), (7, 17), (0, 48))):
        logits[row, [first, other]] = 2.0
    with small(16, 2):
        token = kernels.sample(logits, evenly(3), temperature=0, impl=impl)
    assert token.tolist() == [3, 7, 0]


@both
def test_what_is_not_kept_is_never_drawn_at_the_edges_of_u(impl):
    logits = normal(6, 300)
    logits[:, :5] = logits[:, -7:] = -INF
    for options in ({}, dict(top_k=9), dict(top_p=0.5), dict(min_p=0.3)):
        for u in (0.0, 2**-149, 1 - 2**-24):
            u = torch.full((6,), u, device=DEVICE)
            token = kernels.sample(logits, u, **options, impl=impl)
            p = logits.softmax(-1)
            kept = p >= p.sort(descending=True).values[:, 8:9] if "top_k" in options else p > 0
            if "min_p" in options:
                kept = p >= 0.3 * p.amax(-1, keepdim=True)
            if "top_p" not in options:
                want = [rows.nonzero()[0 if u[0] < 0.5 else -1].item() for rows in kept]
                assert token.tolist() == want
            assert logits.gather(1, token[:, None]).isfinite().all()


@both
def test_a_u_that_float32_rounds_to_1_draws_the_last(impl):
    logits = torch.tensor([[-INF, 0.0, 0.0, -INF]], device=DEVICE)
    u = torch.tensor([1 - 1e-12], dtype=torch.float64, device=DEVICE)
    assert kernels.sample(logits, u, impl=impl).tolist() == [2]


def test_u_out_of_range_on_a_device_draws_the_first_or_the_last():
    logits = normal(6, 50)
    logits[:, :3] = logits[:, -4:] = -INF
    u = torch.tensor([-1.0, 1.0, 7.0, -INF, INF, float("nan")], device=DEVICE)
    token = _sample._forward(logits, u, 1.0, None, None, None)
    assert token.tolist() == [3, 45, 45, 3, 45, 45]


@pytest.mark.parametrize("options", [{}, dict(top_k=3, top_p=0.5), dict(temperature=0.0)])
def test_rows_without_an_answer_give_some_token(options):
    logits = torch.full((3, 20), -INF, device=DEVICE)
    logits[1] = float("nan")
    logits[2, 3] = float("nan")
    token = sample(logits, uniform(3), **options)
    assert ((token >= 0) & (token < 20)).all()


@both
def test_temperatures_that_float32_cannot_hold(impl):
    logits = normal(8, 30)
    logits[:, 4] = -INF
    u = evenly(8)
    greedy = kernels.sample(logits, u, temperature=0.0, impl=impl)
    assert torch.equal(kernels.sample(logits, u, temperature=1e-30, impl=impl), greedy)
    flat = torch.full((29,), 1 / 29, device=DEVICE).cumsum(0)
    want = torch.searchsorted(flat, u, right=True)
    hot = kernels.sample(logits, u, temperature=1e30, impl=impl)
    assert torch.equal(hot, want + (want >= 4))


@both
def test_temperatures_past_float32_are_the_coldest_and_the_hottest(impl):
    logits, u = normal(8, 30), evenly(8)
    run = functools.partial(kernels.sample, logits, u, impl=impl)
    for extreme, held in ((1e-300, 1e-30), (1e-39, 1e-30), (1e300, 1e30)):
        assert torch.equal(run(temperature=extreme), run(temperature=held))
    assert torch.equal(run(temperature=1e-300), run(temperature=0.0))


@both
def test_a_top_p_that_float32_does_not_hold_keeps_the_most_probable(impl):
    logits = normal(4, 30)
    token = kernels.sample(logits, evenly(4), top_p=1e-50, impl=impl)
    assert torch.equal(token, logits.argmax(-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, dict(temperature=0.7, top_k=40, top_p=0.9, min_p=0.01)])
def test_a_row_depends_on_no_other(options, dtype):
    logits, u = normal(3, 4200, dtype=dtype), uniform(3)
    token = sample(logits, u, **options)
    for row in range(3):
        assert token[row] == sample(logits[row], u[row], **options)
    logits[0], u[0] = -INF, 0.3
    assert torch.equal(sample(logits, u, **options)[1:], token[1:])


def test_strides_and_leading_dimensions():
    logits, u = normal(3, 4, 50), uniform(3, 4)
    token = sample(logits, u, top_k=7)
    assert token.shape == (3, 4) and token.dtype == torch.int64
    views = (
        logits.permute(2, 0, 1).contiguous().permute(1, 2, 0),
        torch.stack([logits, logits], 3)[..., 1],
        torch.cat([logits, logits], 1)[:, :4],
    )
    assert not any(v.is_contiguous() for v in views)
    strided = torch.stack([u, u], 2)[..., 0]
    assert all(torch.equal(sample(v, strided, top_k=7), token) for v in views)
    assert torch.equal(sample(logits[:, :1].expand(3, 4, 50), u), sample(logits[:, [0] * 4], u))


@both
def test_no_rows(impl):
    assert kernels.sample(normal(0, 5), uniform(0), top_k=2, impl=impl).shape == (0,)


def test_one_launch_and_no_gradient():
    logits = normal(3, 50).requires_grad_()
    LAUNCHES.clear()
    token = sample(logits, uniform(3), top_k=5, top_p=0.5, min_p=0.1)
    assert LAUNCHES == {"_sample_fwd_kernel": 1}
    assert not token.is_floating_point() and not token.requires_grad


@pytest.mark.parametrize("filters", [(1.0, None, None, None), (0.7, 5, 0.9, 0.1)])
def test_the_operator_is_registered_as_torch_wants_it(filters):
    wanted = torch.library.opcheck(_sample._fwd_op, (normal(3, 50), uniform(3), *filters))
    assert set(wanted.values()) == {"SUCCESS"}, wanted


@both
@pytest.mark.parametrize("options", [{}, dict(temperature=0.7, top_k=5, top_p=0.9, min_p=0.1)])
def test_compiles_as_one_graph_with_the_same_tokens(impl, options):
    torch.compiler.reset()
    fn = functools.partial(kernels.sample, **options, impl=impl)
    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
    inputs = normal(3, 50), uniform(3)
    assert torch.equal(fn(*inputs), compiled(*inputs))


@both
def test_tensors_without_values(impl):
    with FakeTensorMode() as mode:
        logits, u = mode.from_tensor(normal(3, 50).half()), mode.from_tensor(uniform(3))
        token = kernels.sample(logits, u, top_k=5, impl=impl)
    assert token.shape == (3,) and token.dtype == torch.int64


@both
def test_wrong_kinds_of_u_are_refused_in_one_line(impl):
    logits = normal(3, 50)
    for u, message in (
        ([0.5] * 3, "u must be a floating tensor, got list"),
        (torch.zeros(3, dtype=torch.int64, device=DEVICE), "u must be a floating tensor, got "),
        (torch.zeros(3, device="meta"), "u must be on logits's device"),
    ):
        with pytest.raises((TypeError, ValueError), match=f"sample: {message}") as raised:
            kernels.sample(logits, u, impl=impl)
        assert "\n" not in str(raised.value)
