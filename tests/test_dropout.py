"""What holds for dropout beside parity: its mask, its bits, what it saves, its configurations."""

import functools

import numpy as np
import pytest
import torch
from gaugeblock.kernels import _configurations, _dropout
from gaugeblock.kernels._launch import LAUNCHES
from gaugeblock.kernels.candidates import dropout as tuned
from gaugeblock.reference._philox import words
from gaugeblock.reference.catalog import CATALOG
from gaugeblock.reference.oracle.adapters import TorchAdapter
from gaugeblock.reference.oracle.expectation import Expectation
from gaugeblock.reference.oracle.op import Case
from gaugeblock.reference.oracle.result import describe
from torch._subclasses.fake_tensor import FakeTensorMode

from gaugeblock import kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
dropout = functools.partial(kernels.dropout, impl="triton")


def random(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)


@pytest.mark.parametrize(
    "row", _configurations.rows("dropout"), ids=lambda r: f"{r['architecture']}-{r['bits']}"
)
def test_every_configuration_of_the_table(row, monkeypatch):
    monkeypatch.setattr(_dropout, "architecture", lambda: row["architecture"])
    used = []
    find = _configurations.find
    monkeypatch.setattr(
        _dropout, "find", lambda op, **key: used.append(find(op, **key)) or used[-1]
    )
    for N in (row["BLOCK_N"], 2 * row["BLOCK_N"] + 1):
        case = Case("configuration", M=1, N=N, p=0.3, seed=-3)
        for dtype in ("float32",) if row["bits"] == 32 else ("float16", "bfloat16"):
            results = Expectation(CATALOG["dropout"], case, dtype).judge(
                TorchAdapter(DEVICE), dropout
            )
            assert not [describe(r) for r in results if not r.passed]
    assert used and all(found == row for found in used)


def test_every_candidate_is_right_and_has_the_same_bits():
    for row in _configurations.rows("dropout"):
        assert tuned.candidates(row)[0] == {name: row[name] for name in tuned.LAUNCH}
    row = _configurations.rows("dropout")[0]
    x = random(5000, dtype=torch.bfloat16)
    plain = dropout(x, 0.2, 9)
    for candidate in tuned.candidates(row):
        with _configurations.trial("dropout", lambda key, c=candidate: key | c):
            problem = tuned.problem(row, torch.bfloat16, DEVICE, candidate)
            for got, want in zip(problem.answers(), problem.twin(*problem.inputs), strict=True):
                torch.testing.assert_close(got, want, rtol=2**-8, atol=0)
            assert torch.equal(dropout(x, 0.2, 9), plain)


def test_a_view_has_the_mask_of_its_elements_order():
    x = random(6, 10, 7)
    y = dropout(x, 0.5, 3)
    views = (
        x.permute(2, 0, 1).contiguous().permute(1, 2, 0),
        torch.stack([x, x], 3)[..., 1],
        torch.cat([x, x], 2)[..., 7:],
    )
    assert not any(v.is_contiguous() for v in views)
    assert all(torch.equal(dropout(v, 0.5, 3), y) for v in views)
    assert torch.equal(dropout(x.reshape(-1), 0.5, 3), y.reshape(-1))
    assert 0.3 < (y == 0).float().mean() < 0.7


@pytest.mark.parametrize("impl", ["triton", "eager"])
def test_what_is_dropped_is_0_whatever_was_there(impl):
    x = random(4, 100)
    y = kernels.dropout(x, 0.5, 1, impl=impl)
    spoilt = torch.where(y == 0, torch.tensor([torch.nan, torch.inf]).to(x).repeat(4, 50), x)
    assert torch.equal(kernels.dropout(spoilt, 0.5, 1, impl=impl), y)
    assert torch.equal(kernels.dropout(x, 0.0, 1, impl=impl), x)
    assert (kernels.dropout(spoilt, 1.0, 1, impl=impl) == 0).all()


@pytest.mark.parametrize("impl", ["triton", "eager"])
def test_a_seed_is_its_64_bits(impl):
    x = random(300)
    run = functools.partial(kernels.dropout, x, 0.5, impl=impl)
    assert torch.equal(run(-5), run(2**64 - 5))
    assert torch.equal(run(7), run(np.int64(7)))
    assert not torch.equal(run(7), run(7 + 2**32))
    assert not torch.equal(run(7), run(8))


@pytest.mark.parametrize("impl", ["triton", "eager"])
def test_a_word_that_equals_the_threshold_is_kept(impl):
    x, word = random(40), int(words(np.arange(1, dtype=np.uint64), 5)[0])
    assert kernels.dropout(x, word / 2**32, 5, impl=impl)[0] != 0
    assert kernels.dropout(x, (word + 1) / 2**32, 5, impl=impl)[0] == 0


def test_nothing_is_saved_and_each_direction_is_one_launch():
    saved = []
    x = random(33, 7).requires_grad_()
    LAUNCHES.clear()
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda x: x):
        y = dropout(x, 0.25, 1)
    y.sum().backward()
    assert saved == []
    assert LAUNCHES == {"_dropout_kernel": 2}
    assert torch.equal(x.grad, torch.where(y == 0, 0.0, torch.tensor(1 / 0.75).to(x)))


def test_gradcheck_in_float64():
    x = random(3, 5, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: dropout(x, 0.5, 1), (x,))


@pytest.mark.parametrize("impl", ["triton", "eager"])
def test_tensors_without_values(impl):
    with FakeTensorMode() as mode:
        x = mode.from_tensor(random(3, 5, dtype=torch.float16))
        y = kernels.dropout(x, 0.5, 1, impl=impl)
    assert y.shape == x.shape and y.dtype == torch.float16


def test_a_seed_that_changes_is_not_compiled_again():
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()
    compiled = torch.compile(lambda x, seed: dropout(x, 0.5, seed), backend=counter, dynamic=True)
    x = random(50)
    for seed in (5, 6, 7, -9):
        assert torch.equal(compiled(x, seed), dropout(x, 0.5, seed))
    assert counter.frame_count == 1
