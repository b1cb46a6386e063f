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
# each case contiguous and, turn about with the dtypes, in three of the other layouts
POINTS = [
    pytest.param(
        op, case, dtype, layout, impl,
        id=f"{op.name}-{case.name}-{SHORT[dtype]}-{layout}-{impl}",
    )
    for op in CATALOG.values()
    if op.kernel is None
    for i, case in enumerate(op.select("full", op.supported))
    for j, dtype in enumerate(DTYPES)
    for layout in ("contiguous", OTHERS[(i + j) % len(OTHERS)])
    for impl in ("triton", "eager")
]  # fmt: skip


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
    empty = 0 in op.dims(case).values()
    assert launched >= (0 if empty else 2) if impl == "triton" else launched == 0
    assert not [describe(r) for r in results if not r.passed]
    assert len(results) >= 1 + len(op.differentiable(expected.content(layout).inputs))


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
