"""`pytest benchmarks`: the catalog's bench cases, each provider gated by parity, then timed.

On a CPU: the NumPy reference, the eager twins and plain torch. On a GPU: the Triton kernels, the
eager twins and plain torch.
"""

import numpy as np
import pytest
import torch
from gaugeblock.benchmarks.gate import Wrong, gate
from gaugeblock.benchmarks.providers import bench_cases, providers, torch_inputs
from gaugeblock.reference.catalog import CATALOG

from gaugeblock import reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = "bfloat16" if DEVICE == "cuda" else "float32"
POINTS = [
    pytest.param(op, case, provider, direction, id=f"{op}-{case.name}-{direction}-{provider}")
    for op in CATALOG
    for case in bench_cases(op, DEVICE)
    for direction in ("fwd", "bwd")
    for provider in providers(op, DEVICE)
]


@pytest.mark.parametrize(("op", "case", "provider", "direction"), POINTS)
def test_time(benchmark, op, case, provider, direction):
    fn = providers(op, DEVICE)[provider]
    row = CATALOG[op]
    options = row.options(case)
    if provider == "reference":
        # the reference is what the others are gated against
        run = _reference_call(row, case, options, direction)
    else:
        try:
            gate(op, case, DTYPE, fn, DEVICE)
        except Wrong as wrong:
            if provider in ("gaugeblock", "eager"):
                raise
            # somebody else's defect: no time for it, and no failure of ours
            pytest.skip(f"not timed, {provider} is wrong: {wrong}")
        run = _torch_call(
            fn, torch_inputs(op, case, getattr(torch, DTYPE), DEVICE), options, direction
        )
    itemsize = 8 if provider == "reference" else getattr(torch, DTYPE).itemsize
    benchmark.group = f"{op} {case.name} {direction}"
    benchmark.extra_info.update(
        provider=provider,
        dtype="float64" if provider == "reference" else DTYPE,
        flops=row.flop_count(case, direction),
        bytes=row.byte_count(case, itemsize, direction),
    )
    benchmark.pedantic(run, rounds=10, warmup_rounds=2)


def _torch_call(fn, tensors, options, direction):
    """A call that returns when the device is done."""

    def done():
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    if direction == "fwd":

        def run():
            with torch.no_grad():
                fn(*tensors, **options)
            done()

        return run
    y = fn(*tensors, **options)
    floating = [t for t in tensors if t.requires_grad]
    dy = torch.randn_like(y)

    def run():
        torch.autograd.grad(y, floating, dy, retain_graph=True)
        done()

    return run


def _reference_call(row, case, options, direction):
    inputs = row.draw(case, np.random.default_rng(0)).values()
    forward = getattr(reference, row.name)
    if direction == "fwd":
        return lambda: forward(*inputs, **options)
    y, cache = forward(*inputs, **options)
    backward, dy = getattr(reference, f"{row.name}_backward"), np.ones_like(y)
    return lambda: backward(dy, cache)
