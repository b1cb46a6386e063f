"""The oracle blames no legal kernel of the bank, whatever the seed of its inputs."""

import pytest
from gaugeblock.reference.catalog import CATALOG

from tests.bank import legal, measure


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
    assert compared > 280
    assert not blamed
    assert not broken


def test_a_wrong_kernel_among_them_is_blamed(monkeypatch):
    right = next(v for v in legal.VARIANTS if v.op == "layer_norm")

    def wrong(*inputs, **options):
        return 1.01 * right.fn(*inputs, **options)

    variant = legal.Variant("wrong", right.op, wrong, ("float32",))
    _, blamed, _ = judged(right.op, [variant], range(1), monkeypatch)
    assert any("wrong" in str(names) for names in blamed.values())
