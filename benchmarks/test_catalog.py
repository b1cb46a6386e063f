"""`pytest benchmarks`: the catalog's timed cases under pytest-benchmark, each behind the gate.

The same cases, providers and clock as `gaugeblock bench`, one test for each.
"""

import functools

import pytest
import torch
from gaugeblock.benchmarks import ceilings, honesty, roofline
from gaugeblock.benchmarks.calls import Contender, InputSets
from gaugeblock.benchmarks.gate import Gate, Refused
from gaugeblock.benchmarks.plan import DIRECTIONS, planned
from gaugeblock.benchmarks.providers import OURS, load
from gaugeblock.benchmarks.pytest_timer import AdvancingTimer

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = "bfloat16" if DEVICE == "cuda" else "float32"
TIMER = AdvancingTimer(DEVICE)
PROVIDERS = {p.name: p for p in load(DEVICE)[0] if not p.slow_start}
POINTS = [
    pytest.param(op, case, name, direction, id=f"{op.name}-{case.name}-{direction}-{name}")
    for op, case in planned((), "quick", DEVICE)
    for direction in (DIRECTIONS if op.differentiable() else DIRECTIONS[:1])
    for name, provider in PROVIDERS.items()
    if not provider.cannot(op, case, DTYPE, direction)
]


@functools.lru_cache(maxsize=1)
def gate(op, case):
    return Gate(op, case, DTYPE, DEVICE)


@pytest.fixture(scope="session")
def measured():
    return ceilings.measure(DEVICE, budget_s=5.0)


@pytest.mark.benchmark(timer=TIMER)
@pytest.mark.parametrize(("op", "case", "name", "direction"), POINTS)
def test_time(benchmark, measured, op, case, name, direction):
    fn = PROVIDERS[name].ops[op.name]
    both = not PROVIDERS[name].cannot(op, case, DTYPE, "bwd")
    try:
        gate(op, case).check(fn, both)
        sets = InputSets(gate(op, case).expectation, DEVICE)
        contender = Contender(name, fn, sets, direction)
        honesty.before(contender, sets)
        honesty.clocks()
    except Refused as refused:
        if name == OURS:
            raise
        # somebody else's defect: no time for it, and no failure of ours
        pytest.skip(f"not timed, {refused}")
    itemsize = getattr(torch, DTYPE).itemsize
    moved, flops = op.byte_count(case, itemsize, direction), op.flop_count(case, direction)
    roof_ms, roof = roofline.roof(measured, DTYPE, moved, flops)
    benchmark.group = f"{op.name} {case.name} {direction}"
    benchmark.pedantic(TIMER.timed(lambda: contender.run(0)), rounds=10, warmup_rounds=2)
    benchmark.extra_info.update(provider=name, dtype=DTYPE, flops=flops, bytes=moved, roof=roof)
    if benchmark.stats and roof_ms:
        median_ms = 1e3 * benchmark.stats.stats.median
        benchmark.extra_info["percent_of_roof"] = 100 * roof_ms / median_ms
