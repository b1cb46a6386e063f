"""Every implementation of every op against the reference: outputs and all gradients."""

import functools

import pytest
import torch
from gaugeblock.kernels._launch import INTERPRETED, LAUNCHES
from gaugeblock.reference.catalog import CATALOG
from gaugeblock.reference.oracle.adapters import LAYOUTS, TorchAdapter
from gaugeblock.reference.oracle.budget import DTYPES
from gaugeblock.reference.oracle.expectation import Expectation
from gaugeblock.reference.oracle.result import describe

from gaugeblock import kernels

SHORT = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
OTHERS = [layout for layout in LAYOUTS if layout not in ("contiguous", "bthd")]


def others(op):
    """The layouts beside contiguous; one memory cell cannot hold several new values."""
    return [layout for layout in OTHERS if layout != "expanded" or not op.updates]


def points(op):
    """Each case contiguous and, turn about with the dtypes, in three of the other layouts.

    What a quick check leaves out comes in other layouts among the slow tests.
    """
    rotating = others(op)
    for i, case in enumerate(op.select("full", op.supported)):
        for j, dtype in enumerate(DTYPES):
            for layout in ("contiguous", rotating[(i + j) % len(rotating)]):
                slow = "full" in case.tags and layout != "contiguous"
                for impl in ("triton", "eager"):
                    yield pytest.param(
                        op, case, dtype, layout, impl,
                        id=f"{op.name}-{case.name}-{SHORT[dtype]}-{layout}-{impl}",
                        marks=[pytest.mark.slow] if slow else [],
                    )  # fmt: skip


POINTS = [point for op in CATALOG.values() if op.kernel is None for point in points(op)]


@functools.lru_cache(maxsize=8)
def expectation(op, case, dtype):
    return Expectation(op, case, dtype)


def judge(op, case, dtype, layout, impl, device):
    fn = functools.partial(getattr(kernels, op.name), impl=impl)
    before = LAUNCHES.total()
    expected = expectation(op, case, dtype)
    results = expected.judge(TorchAdapter(device), fn, layout)
    launched = LAUNCHES.total() - before
    # eager must never be checked against itself
    least = 0 if 0 in op.dims(case).values() else 1 + bool(op.differentiable())
    assert launched >= least if impl == "triton" else launched == 0
    assert not [describe(r) for r in results if not r.passed]
    assert len(results) >= 1 + len(expected.content(layout).names(1))


@pytest.mark.parametrize(("op", "case", "dtype", "layout", "impl"), POINTS)
def test_parity(op, case, dtype, layout, impl):
    if impl == "triton" and not INTERPRETED:
        pytest.skip("kernels are compiled in this process: see test_parity_on_the_gpu")
    judge(op, case, dtype, layout, impl, "cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("op", "case", "dtype", "layout", "impl"), POINTS)
def test_parity_on_the_gpu(op, case, dtype, layout, impl):
    judge(op, case, dtype, layout, impl, "cuda")
