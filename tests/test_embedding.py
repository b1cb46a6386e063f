"""What holds for embedding beside parity: no update is lost in any block; ids; positions."""

import functools

import numpy as np
import pytest
import torch
from gaugeblock.kernels import _configurations, _embedding
from gaugeblock.kernels._launch import LAUNCHES
from gaugeblock.kernels.candidates import embedding as tuned
from gaugeblock.reference.catalog import CATALOG
from gaugeblock.reference.oracle.adapters import TorchAdapter
from gaugeblock.reference.oracle.expectation import Expectation
from gaugeblock.reference.oracle.op import Case
from gaugeblock.reference.oracle.result import describe
from torch._subclasses.fake_tensor import FakeTensorMode

from gaugeblock import kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
embedding = functools.partial(kernels.embedding, impl="triton")


def random(*shape, seed=0, dtype=torch.float32):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=draw).to(DEVICE, dtype)


def ids(*shape, below, seed=0, dtype=torch.int64):
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(below, shape, generator=draw).to(DEVICE, dtype)


def whole_numbers(*shape, seed=0):
    """Sums of which float32 holds exactly, in any order."""
    return ids(*shape, below=17, seed=seed).float() - 8


def summed(dy, index, rows):
    table = torch.zeros(rows, dy.shape[1], device=dy.device)
    return table.index_add(0, index.long(), dy)


@pytest.mark.parametrize("bits", [16, 32])
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_every_configuration_of_the_table(architecture, bits, monkeypatch):
    """More rows and columns than any tile has."""
    monkeypatch.setattr(_embedding, "architecture", lambda: architecture)
    rows = [
        row
        for row in _configurations.rows("embedding")
        if (row["architecture"], row["bits"]) == (architecture, bits)
    ]
    used = []
    find = _configurations.find
    monkeypatch.setattr(
        _embedding, "find", lambda op, **key: used.append(find(op, **key)) or used[-1]
    )
    T = max(row["BLOCK_M"] for row in rows) + 5
    C = max(row["BLOCK_N"] for row in rows) + 3
    case = Case("configuration", B=2, T=T, V=T, P=T + 1, C=C)
    for dtype in ("float32",) if bits == 32 else ("float16", "bfloat16"):
        results = Expectation(CATALOG["embedding"], case, dtype).judge(
            TorchAdapter(DEVICE), embedding
        )
        assert not [describe(r) for r in results if not r.passed]
    assert {row["kernel"]: row for row in used} == {row["kernel"]: row for row in rows}


@pytest.mark.parametrize("row", _configurations.rows("embedding")[::2], ids=lambda r: r["kernel"])
def test_a_candidate_is_right_at_a_ragged_shape(row):
    own, *others = tuned.candidates(row)
    assert own == {name: row[name] for name in tuned.LAUNCH}
    find = _configurations._find
    for candidate in others[:: max(len(others) - 1, 1)]:

        def choose(key, candidate=candidate):
            return find("embedding", **key) | (candidate if key["kernel"] == row["kernel"] else {})

        with _configurations.trial("embedding", choose):
            problem = tuned.problem(row, torch.float32, DEVICE, candidate)
            for got, want in zip(problem.answers(), problem.twin(*problem.inputs), strict=True):
                torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("M", [32, 33, 64, 65, 2100])
def test_no_update_is_lost_where_all_tokens_are_equal(M):
    """More blocks than partial sums are added at a time, among others."""
    assert M < 100 or M > 2 * _embedding._PARTS * 32
    dy, wte = whole_numbers(M, 5), random(4, 5)
    tokens = torch.full((1, M), 2, device=DEVICE)
    embedding(tokens, wte.requires_grad_()).backward(dy[None])
    assert torch.equal(wte.grad, summed(dy, tokens[0], 4))
    assert wte.grad[2].any()


def test_no_update_is_lost_wherever_tokens_begin_and_end(monkeypatch):
    """Blocks of four positions, two partial sums at a time: many patterns of runs."""
    monkeypatch.setattr(_embedding, "_PARTS", 2)

    def small(key):
        return _configurations._find("embedding", **key) | {"BLOCK_M": 4, "BLOCK_N": 16}

    draw = np.random.default_rng(0)
    with _configurations.trial("embedding", small):
        for M in range(1, 24):
            runs = draw.random(M) < draw.choice([0.1, 0.3, 0.7])
            tokens = torch.from_numpy(np.cumsum(runs)[draw.permutation(M)]).to(DEVICE)
            dy = whole_numbers(M, 17, seed=M)
            dwte, _ = _embedding._backward(dy, tokens, None, M, M + 1, 0)
            assert torch.equal(dwte, summed(dy, tokens, M + 1)), tokens.tolist()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_ids_out_of_range_on_a_device_give_nan_and_take_part_in_no_gradient(dtype):
    V, P, C, M = 6, 5, 8, 70
    wte, wpe, dy = random(V, C), random(P, C, seed=1), whole_numbers(M, C)
    for index, rows, run in (
        ("tokens", V, lambda i: _embedding._forward(i, wte, None, None, M)),
        ("positions", P, lambda i: _embedding._forward(i * 0, wte, wpe, i, M)),
    ):
        spoilt = ids(M, below=rows, dtype=dtype)
        wrong = torch.arange(M, device=DEVICE) % 3 == 0
        bad = torch.tensor([-1, rows, 2**31 - 1, -(2**31)], device=DEVICE, dtype=dtype)
        spoilt[wrong] = bad[ids(int(wrong.sum()), below=4)]
        right = spoilt.where(~wrong, 0)
        y = run(spoilt)
        assert y[wrong].isnan().all(), index
        assert torch.equal(y[~wrong], run(right)[~wrong])
        table = _embedding._summed(dy, spoilt, rows)
        assert torch.equal(table, summed(dy * ~wrong[:, None], right, rows))
    # for positions by default too, past the table's end
    y = _embedding._forward(ids(7, below=V), wte, wpe, None, 7)
    assert y[P:].isnan().all() and y[:P].isfinite().all()


@pytest.mark.parametrize("shape", [(7,), (1, 7), (3, 7), (2, 3, 7), (3, 1), (1,), ()])
def test_positions_that_are_given(shape):
    tokens = ids(2, 3, 7, below=11)
    wte, wpe = (random(rows, 9, seed=rows).requires_grad_() for rows in (11, 20))
    positions = ids(*shape, below=20, seed=3, dtype=torch.int32)
    results = []
    for impl in ("triton", "eager"):
        y = kernels.embedding(tokens, wte, wpe, positions, impl=impl)
        dy = whole_numbers(*y.shape)
        results.append([y, *torch.autograd.grad(y, (wte, wpe), dy)])
    for mine, twin in zip(*results):
        assert torch.equal(mine, twin)
    assert torch.equal(results[0][2], summed(dy.view(-1, 9), positions.expand(2, 3, 7).ravel(), 20))


def test_positions_by_default_are_counted_in_every_row():
    tokens = ids(2, 3, 7, below=11)
    wte, wpe = (random(rows, 9, seed=rows).requires_grad_() for rows in (11, 20))
    y = embedding(tokens, wte, wpe)
    given = embedding(tokens, wte, wpe, torch.arange(7, device=DEVICE))
    assert torch.equal(y, given)
    dy = whole_numbers(*y.shape)
    own, other = (torch.autograd.grad(x, (wte, wpe), dy) for x in (y, given))
    assert all(torch.equal(a, b) for a, b in zip(own, other))
    assert own[1][:7].any() and not own[1][7:].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_depends_on_no_other(dtype):
    wte, wpe = random(50, 33, dtype=dtype), random(9, 33, seed=1, dtype=dtype)
    tokens = ids(6, 9, below=50)
    y = embedding(tokens, wte, wpe)
    assert all(torch.equal(y[b : b + 1], embedding(tokens[b : b + 1], wte, wpe)) for b in range(6))
    wte[tokens[0, 0]] = float("nan")
    spoilt = embedding(tokens, wte, wpe)
    assert torch.equal(spoilt.isnan().all(-1), tokens == tokens[0, 0])


def test_a_nan_stays_in_its_tokens_gradient():
    tokens = torch.arange(40, device=DEVICE) % 13
    dy = whole_numbers(40, 8)
    dy[5] = float("nan")
    dwte, _ = _embedding._backward(dy, tokens, None, 40, 13, 0)
    assert torch.equal(dwte.isnan().all(1), torch.arange(13, device=DEVICE) == 5)


def test_strides():
    tokens, wte, wpe, dy = ids(5, 7, below=11), random(11, 24), random(7, 24), random(5, 7, 24)
    twice = torch.stack([wpe, wpe], 2)[..., 0]
    views = tokens.T.contiguous().T, wte.T.contiguous().T, twice
    assert not any(v.is_contiguous() for v in views)
    results = []
    for (t, *tables), grad in (((tokens, wte, wpe), dy), (views, dy.transpose(0, 1).contiguous())):
        tables = [x.detach().requires_grad_() for x in tables]
        y = embedding(t, *tables)
        grad = grad if grad.shape == y.shape else grad.transpose(0, 1)
        results.append([y, *torch.autograd.grad(y, tables, grad)])
    for plain, strided in zip(*results):
        assert torch.equal(plain, strided)


def test_launches_and_what_is_saved():
    saved = []
    tokens = ids(2, 40, below=11)
    wte, wpe = (random(rows, 9).requires_grad_() for rows in (11, 40))
    LAUNCHES.clear()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        y = embedding(tokens, wte, wpe)
    assert LAUNCHES == {"_embedding_fwd_kernel": 1}
    assert [x.shape for x in saved] == [(80,)] and saved[0].dtype == torch.int64
    LAUNCHES.clear()
    y.sum().backward()
    assert LAUNCHES == {
        "_embedding_bwd_blocks_kernel": 1,
        "_embedding_bwd_merge_kernel": 1,
        "_embedding_bwd_positions_kernel": 1,
    }


def test_gradcheck_in_float64():
    wte, wpe = (random(rows, 1, dtype=torch.float64).requires_grad_() for rows in (2, 3))
    tokens, positions = ids(2, 2, below=2), ids(2, 2, below=3)
    for given in (None, positions):
        assert torch.autograd.gradcheck(lambda *x, at=given: embedding(tokens, *x, at), (wte, wpe))


@pytest.mark.parametrize("impl", ["triton", "eager"])
@pytest.mark.parametrize("shape", [(0,), (0, 5), (3, 0), (1,)])
def test_few_tokens_or_none(shape, impl):
    tokens = ids(*shape, below=4)
    wte, wpe = (random(rows, 3).requires_grad_() for rows in (4, 6))
    y = kernels.embedding(tokens, wte, wpe, impl=impl)
    assert y.shape == (*shape, 3)
    y.sum().backward()
    assert wte.grad.sum() == wpe.grad.sum() == y.numel()


@pytest.mark.parametrize("given", [False, True])
def test_compiles_as_one_graph_with_the_same_bits(given):
    tokens = ids(2, 5, below=4)
    positions = ids(5, below=6) if given else None
    results = []
    for wrap in (
        lambda f: f,
        functools.partial(torch.compile, fullgraph=True, backend="aot_eager"),
    ):
        wte, wpe = (random(rows, 3).requires_grad_() for rows in (4, 6))
        y = wrap(embedding)(tokens, wte, wpe, positions)
        y.square().sum().backward()
        results.append((y, wte.grad, wpe.grad))
    for plain, traced in zip(*results):
        assert torch.equal(plain, traced)


def test_positions_may_come_where_sizes_have_become_symbols():
    torch.compiler.reset()
    wte, wpe = random(7, 3), random(9, 3)
    compiled = torch.compile(embedding, fullgraph=True, backend="aot_eager")
    for B, T, given in ((2, 7, False), (3, 5, False), (4, 6, False), (3, 5, True), (2, 4, True)):
        tokens, positions = ids(B, T, below=7), ids(T, below=9) if given else None
        want = embedding(tokens, wte, wpe, positions)
        assert torch.equal(compiled(tokens, wte, wpe, positions), want)


def test_the_operators_with_given_positions_are_registered_as_torch_wants_them():
    tokens, positions = ids(10, below=4), ids(5, below=6)
    wte, wpe = (random(rows, 3).requires_grad_() for rows in (4, 6))
    for operator, arguments in (
        (_embedding._fwd_op, (tokens, wte, wpe, positions, 5)),
        (_embedding._fwd_op, (tokens, wte, None, None, 5)),
        (_embedding._bwd_op, (random(10, 3), tokens, positions, 5, 4, 6)),
        (_embedding._bwd_op, (random(10, 3), tokens, None, 5, 4, 0)),
    ):
        assert set(torch.library.opcheck(operator, arguments).values()) == {"SUCCESS"}


@pytest.mark.parametrize("impl", ["triton", "eager"])
def test_tensors_without_values(impl):
    with FakeTensorMode() as mode:
        tokens, wte, wpe = (mode.from_tensor(x) for x in (ids(2, 5, below=4), random(4, 3).half(),
                                                          random(6, 3).half()))  # fmt: skip
        y = kernels.embedding(tokens, wte, wpe, impl=impl)
    assert y.shape == (2, 5, 3) and y.dtype == torch.float16


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        (lambda: torch.tensor([0, 1, 6]), r"positions must lie in 0 … P − 1 = 5, got 6"),
        (lambda: torch.tensor([0, -1, 5]), r"positions must lie in 0 … P − 1 = 5, got -1"),
        (lambda: torch.zeros(3), r"positions must be integers \(int32, int64\), got torch.float32"),
        (lambda: [0, 1, 2], "positions must be a torch tensor, got list"),
        (lambda: torch.zeros(2, dtype=torch.int64), r"broadcastable to tokens' shape \(2, 3\)"),
        (lambda: torch.zeros(4, 2, 3, dtype=torch.int64), r"broadcastable to tokens' shape"),
    ],
)
@pytest.mark.parametrize("impl", ["triton", "eager"])
def test_wrong_positions_are_refused_in_one_line(positions, message, impl):
    if DEVICE == "cuda":
        pytest.skip("values on a GPU are not looked at")
    tokens, wte, wpe = ids(2, 3, below=4), random(4, 3), random(6, 3)
    with pytest.raises((ValueError, TypeError), match=message) as raised:
        kernels.embedding(tokens, wte, wpe, positions(), impl=impl)
    assert str(raised.value).startswith("embedding: ") and "\n" not in str(raised.value)


@pytest.mark.parametrize("impl", ["triton", "eager"])
def test_more_tokens_than_positions_are_refused(impl):
    with pytest.raises(ValueError, match="positions must lie in 0 … P − 1 = 5, got 6; give"):
        kernels.embedding(ids(2, 7, below=4), random(4, 3), random(6, 3), impl=impl)
