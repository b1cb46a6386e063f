"""The oracle names every wrong kernel of the bank wrong, on the case where it was first seen."""

import json
from dataclasses import replace

import pytest
from gaugeblock.reference.oracle import check

from tests.bank import mutants_attention, mutants_decode, mutants_loss
from tests.bank.__main__ import RECORD, op_of, run
from tests.bank.bugs import BUGS
from tests.bank.mutants import bank

MUTANTS = bank()


@pytest.fixture(scope="module")
def recorded():
    return json.loads(RECORD.read_text())


@pytest.mark.parametrize("name", MUTANTS)
def test_a_wrong_kernel_is_named_wrong(name, recorded):
    mutant = MUTANTS[name]
    # 16 bits hide more than 32
    dtype = mutant.dtypes[-1]
    seen = recorded[name]["first"][dtype]
    op = op_of(mutant)
    (last,) = (i for i, c in enumerate(op.cases) if c.name == seen["case"])
    cases = op.cases[last - mutant.after : last + 1]
    arguments = mutant.checks | {"layouts": (seen["layout"],), "dtypes": (dtype,)}
    report = check(replace(op, cases=cases), mutant.candidate(), cases="full", **arguments)
    assert not report.passed
    # a mutant is wrong, not broken
    assert not {r.kind for r in report.failures} & {"exception", "form", "shape", "dtype"}


def test_the_record_has_every_mutant_in_every_dtype(recorded):
    assert {n: set(m.dtypes) for n, m in MUTANTS.items()} == {
        n: set(r["first"]) for n, r in recorded.items()
    }


def test_every_line_of_the_bug_bank_has_a_mutant():
    bugs = {mutant.bug for mutant in MUTANTS.values()}
    assert [bug for family in BUGS.values() for bug in family if bug not in bugs] == []


def test_the_bank_is_large():
    assert sum(not m.cheat for m in MUTANTS.values()) >= 75
    assert len({m.name.split("/")[1] for m in MUTANTS.values() if m.cheat}) >= 10


@pytest.mark.slow
@pytest.mark.parametrize(
    ("op", "base"),
    [
        ("attention", mutants_attention.Attention),
        ("attention", mutants_attention.Walk),
        ("attention", mutants_attention.Split),
        ("paged_attention", mutants_decode.PagedAttention),
        ("cross_entropy", mutants_loss.CrossEntropy),
        ("linear_cross_entropy", mutants_loss.LinearCrossEntropy),
    ],
)
def test_what_the_mutants_are_made_of_is_right(op, base):
    report = check(op, base(), dtypes=("float32", "float16", "bfloat16"), memory=False)
    assert report.passed, report.failures


@pytest.mark.slow
@pytest.mark.parametrize(("cases", "share"), [("quick", 0.98), ("full", 1.0)])
def test_the_whole_bank_is_seen(cases, share):
    found = run(list(MUTANTS.values()), cases)
    missed = [n for n, dtypes in found.items() if not all(dtypes.values())]
    assert len(missed) <= (1 - share) * len(MUTANTS), missed
