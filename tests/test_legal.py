"""The oracle blames no legal kernel of the bank, whatever the seed of its inputs."""

import numpy as np
import pytest
from gaugeblock.reference._rounding import Arithmetic, chained
from gaugeblock.reference.catalog import CATALOG
from gaugeblock.reference.oracle import Case
from gaugeblock.reference.oracle.adapters import TorchAdapter
from gaugeblock.reference.oracle.expectation import Expectation

from tests.bank import legal, measure, models


def judged(op, variants, seeds, monkeypatch):
    """(tensors compared, blamed variants with their ratios, calls that could not be made)."""
    monkeypatch.setattr(legal, "VARIANTS", variants)
    tallies, broken = measure.measure(seeds, [op], legal.ALL, slow_seeds=0)
    compared = sum(tally.compared for tally in tallies.values())
    return compared, {key: tally.blamed for key, tally in tallies.items() if tally.blamed}, broken


def test_the_bank_is_large_and_covers_every_op():
    assert len(legal.VARIANTS) >= 200
    assert {v.op for v in legal.VARIANTS} == set(CATALOG)
    names = [v.name for v in legal.VARIANTS]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("op", CATALOG)
@pytest.mark.parametrize("seeds", [range(1), pytest.param(range(1, 3), marks=pytest.mark.slow)])
def test_no_legal_kernel_is_blamed(op, seeds, monkeypatch):
    compared, blamed, broken = judged(op, legal.VARIANTS, seeds, monkeypatch)
    assert compared >= 10
    assert not blamed
    assert not broken


@pytest.mark.parametrize("shape", [dict(M=3, K=6400), dict(M=6400, K=3)])
@pytest.mark.parametrize("step", [1, 8])
def test_terms_added_one_after_the_other_are_legal_however_many(shape, step):
    kernel = models.Linear(step=step, chunk=step)
    expectation = Expectation(CATALOG["linear"], Case("terms", N=5, **shape), "float32")
    results = expectation.judge(TorchAdapter(), kernel)
    assert [r.output for r in results] == ["y", "dx", "dw", "db"]
    assert all(r.passed for r in results), results


@pytest.mark.parametrize("chunk", [1, 4])
@pytest.mark.parametrize("length", [200, 300, 5000])
def test_a_chain_of_roundings_is_drawn_as_long_as_it_is(length, chunk):
    rng = np.random.default_rng(length)
    a, b = (np.abs(rng.standard_normal((24, length), np.float32)) for _ in range(2))
    arithmetic = Arithmetic(np.dtype(np.float32), chunk=chunk, noise=False)
    products, exact = added(a[:, None] * b, chunk), (a.astype(float)[:, None] * b).sum(-1)
    ratio = off(arithmetic.matmul(a, b.T), exact) / off(products, exact)
    assert 0.75 < ratio < 1.33
    terms = (a[:, None] * b).reshape(-1, length)
    sums, exact = added(terms, chunk), terms.astype(float).sum(-1)
    ratio = off(arithmetic.sum(terms, axis=1), exact) / off(sums, exact)
    assert 0.75 < ratio < 1.33
    # so are sums over blocks, which are only added in the end
    blocks = np.split(arithmetic.array(terms), 5, axis=1)
    joined = chained([block.sum(1) for block in blocks], length // 5)
    assert 0.75 < off(joined, exact) / off(sums, exact) < 1.33


def added(terms, chunk):
    """Partial sums of `chunk` terms along the last axis, added one after the other."""
    total = np.float32(0)
    for start in range(0, terms.shape[-1], chunk):
        total = total + terms[..., start : start + chunk].sum(-1)
    return total


def off(sums, exact):
    return np.sqrt(np.mean((sums - exact) ** 2))


def test_a_wrong_kernel_among_them_is_blamed(monkeypatch):
    right = next(v for v in legal.VARIANTS if v.op == "layer_norm")

    def wrong(*inputs, **options):
        return 1.01 * right.fn(*inputs, **options)

    variant = legal.Variant("wrong", right.op, wrong, ("float32",))
    _, blamed, _ = judged(right.op, [variant], range(1), monkeypatch)
    assert any("wrong" in str(names) for names in blamed.values())
