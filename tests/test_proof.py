"""How right the reference is: against exact arithmetic, its own forward, and other people's."""

import json

import numpy as np
import pytest
from gaugeblock.reference.catalog import CATALOG

from tests.proof import __main__ as main
from tests.proof import adversarial, condition, exact, independent, mutants, page, step
from tests.proof.points import Point, backward_of, catalog_points, point

PROVED = {name: CATALOG[name] for name in exact.proved()}
ADVERSARIAL = [
    pytest.param(op, case, id=f"{name}-{case.name}")
    for name, op in PROVED.items()
    for case in adversarial.cases(op)
]
POINTS = [
    pytest.param(op, case, id=f"{op.name}-{case.name}")
    for op, case in catalog_points()
    if op.name in PROVED
]
GRADIENTS = [
    pytest.param(op, case, id=f"{op.name}-{case.name}")
    for op, case in catalog_points(gradients=True)
]
ANALYTIC = [p for p in GRADIENTS if step.analytic(*p.values)]
SMOOTH = [p for p in GRADIENTS if step.smooth(*p.values)]


def test_every_op_with_an_exact_formula_has_adversarial_inputs_and_a_twin():
    assert set(exact.FORMULAS) == set(adversarial.SMALL) == set(independent.TORCH) == set(PROVED)
    without = {op.name for op in PROVED.values() if backward_of(op) is None}
    assert without <= set(exact.GRADIENT_FREE)


@pytest.mark.parametrize(("op", "case"), ADVERSARIAL)
def test_the_error_is_a_few_ulp_times_the_condition_number(op, case):
    found = condition.errors(point(op, case))
    assert found
    assert [e for e in found if not e.ratio <= condition.BOUND] == []


def test_the_measure_sees_a_formula_that_cancels():
    op = CATALOG["linear"]

    class Cancelling(Point):
        def at(self, **changed):
            return tuple((y + 1e6) - 1e6 for y in super().at(**changed))

    p = point(op, next(c for c in adversarial.cases(op) if c.name == "normal"))
    spoilt = Cancelling(p.op, p.case, p.inputs, p.options, p.dys)
    assert max(e.ratio for e in condition.errors(p)) < 1
    assert condition.errors(spoilt)[0].ratio > 1e4


def test_the_measure_finds_a_condition_number_that_is_known():
    # of y = Σ (x + 10⁸)·w, Σ (|x w| + |x w|) over |y|
    op = CATALOG["linear"]
    p = point(op, next(c for c in adversarial.cases(op) if c.name == "offset_1e8"))
    x, w, b = (p.inputs[n] for n in "xwb")
    known = (2 * np.abs(x) @ np.abs(w) + np.abs(b)) / np.abs(x @ w + b)
    with condition.mp.workdps(condition.DIGITS):
        found, y = condition.forward_conditions(condition.Problem(p))[:2]
    got = [float(c / abs(v)) for c, v in zip(found, y)]
    np.testing.assert_allclose(got, known.ravel(), rtol=1e-10)


@pytest.mark.parametrize(("op", "case"), ANALYTIC)
def test_gradients_equal_the_complex_step(op, case):
    error, scale = step.complex_step(point(op, case), np.random.default_rng(0))
    assert error <= 1e-12 * scale


@pytest.mark.parametrize(("op", "case"), SMOOTH)
def test_gradients_equal_central_differences(op, case):
    error, allowance, scale = step.central(point(op, case), np.random.default_rng(0))
    assert error <= allowance
    if "degenerate" not in case.tags and op.options(case).get("scale") != 0:
        assert scale > 10 * allowance, "the check could not have failed"


@pytest.mark.parametrize(("op", "case"), POINTS)
def test_agrees_with_torch_in_float64(op, case):
    if not independent.covers("torch", op, case):
        assert "equals" in case.name
        return
    error, found = independent.worst("torch", point(op, case))
    assert all(np.shape(ours) == theirs.shape for _, ours, theirs in found)
    assert error <= 1e-10


@pytest.mark.parametrize(
    ("op", "case"), [p for p in POINTS if independent.covers("onnx", *p.values)]
)
def test_agrees_with_onnx(op, case):
    error, _ = independent.worst("onnx", point(op, case))
    # constants in float32 are off by 6e-8 of themselves
    assert error <= (6e-8 if op.name in independent.ONNX_ROUNDS else 1e-10)


def _of_jax(count):
    for name in independent.JAX:
        cases = [c for c in CATALOG[name].select() if independent.covers("jax", CATALOG[name], c)]
        yield from ((CATALOG[name], case) for case in cases[:count])


@pytest.mark.parametrize(("op", "case"), [*_of_jax(1)])
def test_agrees_with_jax(op, case):
    assert independent.worst("jax", point(op, case))[0] <= 1e-10


@pytest.mark.slow
@pytest.mark.parametrize(("op", "case"), [*_of_jax(20)])
def test_agrees_with_jax_in_more_cases(op, case):
    assert independent.worst("jax", point(op, case))[0] <= 1e-10


@pytest.fixture(scope="module")
def record():
    return json.loads(page.RECORD.read_text())


@pytest.mark.parametrize("op", PROVED)
def test_a_sample_of_mutants_is_seen_as_recorded(op, record):
    assert mutants.seen(op, mutants.source_of(op)) is None
    known = record["ops"][op]["mutants"]["survivors"]
    survivors = {(s["function"], s["change"]) for s in known}
    found = mutants.mutants(op)
    sample = found[:: max(len(found) // 12, 1)]
    missed = [m[:2] for m in sample if mutants.seen(op, m[2]) is None and m[:2] not in survivors]
    assert missed == []


@pytest.mark.slow
@pytest.mark.parametrize("op", PROVED)
def test_every_mutant_is_seen_or_as_right(op):
    found = mutants.measured(op)
    assert found["of"] >= 6
    assert [s for s in found["survivors"] if s["reason"] is None] == []


def test_the_page_is_of_the_record(record):
    assert set(record["ops"]) == set(PROVED)
    assert main.verdict(record) == 0
    text = page.PAGE.read_text()
    # readers see the newest figures, and nothing typed
    assert page.fill(text, page.parts()) == text
