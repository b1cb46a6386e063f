"""The bench times what is right, and nothing that pretends to be fast."""

import itertools
import json
import subprocess
import threading
import time
from unittest.mock import patch

import jsonschema
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from gaugeblock.benchmarks import bench as bench_module
from gaugeblock.benchmarks import calls, honesty, roofline, timing
from gaugeblock.benchmarks.bench import bench
from gaugeblock.benchmarks.gate import Refused, sibling
from gaugeblock.benchmarks.plan import planned
from gaugeblock.benchmarks.providers import Provider
from gaugeblock.benchmarks.providers import load as load_providers
from gaugeblock.benchmarks.pytest_timer import AdvancingTimer
from gaugeblock.benchmarks.record import CHECKOUT, load_record, slug
from gaugeblock.benchmarks.telemetry import Telemetry, summed_up
from gaugeblock.kernels.ceilings import copy_gb_s
from gaugeblock.kernels.worktree import git
from gaugeblock.reference.catalog import CATALOG
from gaugeblock.reference.oracle.sampled import expectation_of

from tests.helpers import gaugeblock, python

SCHEMA = json.loads((CHECKOUT / "benchmarks" / "record.schema.json").read_text())
CEILINGS = {
    "copy_gb_s": {"1024": 1.0, "1048576": 10.0},
    "matrix_tflop_s": {"float32": 0.1},
    "exp_t_s": 0.001,
}


def plain(x, w, b, eps=1e-5):
    return F.layer_norm(x, x.shape[-1:], w, b, eps)


@pytest.fixture
def timed(monkeypatch, tmp_path):
    """timed(fn, …) -> the record of plain torch and of fn on layer_norm, forward.

    checked: an event that is set when fn has been checked and its timing begins.
    """

    def run(fn, checked=None, **settings):
        if checked:
            # it behaves until it has been checked
            before = bench_module.honesty.before

            def then_set(contender, sets):
                before(contender, sets)
                if contender.name == "mine":
                    checked.set()

            monkeypatch.setattr(bench_module.honesty, "before", then_set)
        providers = [Provider("plain", "1", {"layer_norm": plain})]
        providers.append(Provider("mine", "1", {"layer_norm": fn}))
        monkeypatch.setattr(bench_module, "load_providers", lambda *_: (providers, {}))
        monkeypatch.setattr(bench_module.ceilings, "measure", lambda *_: dict(CEILINGS))
        settings = {"direction": "fwd", "budget_s": 3} | settings
        return bench(["layer_norm"], out=tmp_path / "out", say=lambda line: None, **settings)

    return run


def times(record):
    return {e["provider"]: e["time_ms"]["p50"] for e in record["entries"]}


def refusal(record):
    """Why "mine" got no time; plain torch must have one."""
    assert set(times(record)) == {"plain"}
    (left,) = [x for x in record["left_out"] if x["provider"] == "mine"]
    assert left["refused"] and "\n" not in left["reason"]
    return left["reason"]


def test_both_directions_are_timed_and_recorded(timed, tmp_path):
    record = timed(plain, direction="both")
    assert [(e["provider"], e["direction"]) for e in record["entries"]] == [
        ("plain", "fwd"), ("mine", "fwd"), ("plain", "bwd"), ("mine", "bwd"),
    ]  # fmt: skip
    assert record == load_record(tmp_path / "out")
    jsonschema.validate(record, SCHEMA)
    assert record["complete"] and record["left_out"] == []
    entry = record["entries"][0]
    assert entry["shape"] == {"M": 1024, "N": 768}
    assert entry["bytes"] == 4 * (2 * 1024 * 768 + 2 * 768)
    assert entry["gb_s"] == pytest.approx(entry["bytes"] / entry["time_ms"]["p50"] / 1e6)
    assert entry["percent_of_roof"] == pytest.approx(
        100 * entry["roof_ms"] / entry["time_ms"]["p50"]
    )
    assert len(entry["samples_ms"]) == entry["samples"] >= timing.LEAST_SAMPLES
    assert entry["parity"]["compared"] == 1 and 0 < entry["parity"]["ratio"] < 1
    assert record["entries"][2]["parity"]["compared"] == 3


def test_a_cached_result_is_refused(timed):
    kept = {}

    def cached(x, w, b, eps=1e-5):
        if x.shape not in kept:
            kept[x.shape] = plain(x, w, b, eps)
        return kept[x.shape].clone()

    assert "same answer for other inputs" in refusal(timed(cached))


def test_a_result_cached_by_address_is_refused(timed):
    kept = {}

    def cached(x, w, b, eps=1e-5):
        key = x.data_ptr(), x.shape
        # the memory of the check is not that of the timing
        if key not in kept:
            kept[key] = plain(x, w, b, eps)
        return kept[key].clone()

    assert "new values at the same addresses" in refusal(timed(cached))


def test_a_weight_packed_by_address_is_refused(timed):
    kept = {}

    def packed(x, w, b, eps=1e-5):
        weight = kept.setdefault(w.data_ptr(), w.clone())
        return plain(x, weight, b, eps)

    assert "new values at the same addresses" in refusal(timed(packed))


def test_a_gradient_cached_by_address_is_refused(timed):
    kept = {}

    class Cached(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, w, b):
            ctx.save_for_backward(x, w, b)
            return plain(x, w, b)

        @staticmethod
        def backward(ctx, dy):
            key = dy.data_ptr(), dy.shape, ctx.saved_tensors[0].data_ptr()
            if key not in kept:
                leaves = [t.detach().requires_grad_() for t in ctx.saved_tensors]
                with torch.enable_grad():
                    kept[key] = torch.autograd.grad(plain(*leaves), leaves, dy)
            return tuple(t.clone() for t in kept[key])

    def cached(x, w, b, eps=1e-5):
        return Cached.apply(x, w, b)

    assert "new values at the same addresses" in refusal(timed(cached, direction="bwd"))


def test_fresh_inputs_lie_where_none_have_been(monkeypatch):
    """An allocator gives out again what was freed."""
    places = itertools.count()
    monkeypatch.setattr(calls.secrets, "randbelow", lambda n: 997 * next(places))
    op = CATALOG["layer_norm"]
    case = next(c for c in op.cases if c.name == "cpu_bench")
    sets = calls.InputSets(expectation_of(op, case, "float32"), "cpu")
    seen = set()
    for _ in range(4):
        addresses = {t.data_ptr() for t in sets.fresh()}
        assert len(addresses) == 3 and not addresses & seen
        seen |= addresses


def test_work_left_to_somebody_else_is_refused(timed):
    """What a side stream is on a GPU, a thread is here."""
    checked = threading.Event()

    def later(x, w, b, eps=1e-5):
        y = torch.empty_like(x)
        if not checked.is_set():
            return plain(x, w, b, eps)

        def work():
            time.sleep(0.1)
            y.copy_(plain(x, w, b, eps))

        threading.Thread(target=work).start()
        return y

    assert "in what was timed" in refusal(timed(later, checked=checked))


@pytest.mark.parametrize("name", ["perf_counter_ns", "monotonic_ns", "process_time_ns"])
def test_a_patched_clock_is_refused(timed, monkeypatch, name):
    true = getattr(time, name)
    monkeypatch.setattr(time, name, true)

    def bends(x, w, b, eps=1e-5):
        setattr(time, name, lambda: 0)
        return plain(x, w, b, eps)

    record = timed(bends)
    setattr(time, name, true)
    assert [x["reason"] for x in record["left_out"] if x["provider"] == "mine"] == [
        "changed a clock"
    ]


def test_a_skipped_tail_is_refused(timed):
    def skips(x, w, b, eps=1e-5):
        y = plain(x, w, b, eps)
        y[-1, -5:] = 0
        return y

    assert "wrong layer_norm cpu_bench" in refusal(timed(skips))


def test_a_kernel_that_knows_one_shape_is_refused(timed):
    def knows_one(x, w, b, eps=1e-5):
        assert x.shape == (1024, 768)
        return plain(x, w, b, eps)

    assert "wrong at another shape" in refusal(timed(knows_one))


def test_a_smaller_dtype_is_refused(timed):
    def narrow(x, w, b, eps=1e-5):
        return plain(x.bfloat16(), w.bfloat16(), b.bfloat16(), eps).float()

    def shows_it(x, w, b, eps=1e-5):
        return plain(x, w, b, eps).bfloat16()

    assert "wrong layer_norm cpu_bench float32" in refusal(timed(narrow))
    assert "must be float32" in refusal(timed(shows_it))


def test_a_reused_output_is_refused(timed):
    kept = {}

    def reuses(x, w, b, eps=1e-5):
        y = kept.setdefault(x.shape, torch.empty_like(x.detach()))
        return y.copy_(plain(x, w, b, eps))

    assert "reuses the memory of its last answer" in refusal(timed(reuses))


def test_a_sleeping_peer_is_refused(timed):
    def sleeps(x, w, b, eps=1e-5):
        time.sleep(0.02)
        return plain(x, w, b, eps)

    assert "of its time: it waits" in refusal(timed(sleeps))


def test_work_that_the_clock_does_not_see_is_refused():
    """What a stream that nobody waits for is on a GPU: only the stopwatch sees it."""

    class Contender:
        def run(self, number):
            time.sleep(0.02)

    samples = timing.Samples()
    samples.ms = [5.0] * 10
    with pytest.raises(Refused, match="by a stopwatch, the clock says 5 ms at most"):
        honesty._stopwatch(Contender(), timing.HostClock(), samples)
    samples.ms = [20.0] * 10
    honesty._stopwatch(Contender(), timing.HostClock(), samples)


def test_one_that_breaks_while_it_is_timed_takes_no_time_from_others(timed):
    def breaks_later(x, w, b, eps=1e-5):
        if checked.is_set():
            raise RuntimeError("lost")
        return plain(x, w, b, eps)

    checked = threading.Event()
    record = timed(breaks_later, checked=checked, direction="both")
    assert [(e["provider"], e["direction"]) for e in record["entries"]] == [
        ("plain", "fwd"), ("plain", "bwd"),
    ]  # fmt: skip
    left = [(x["provider"], x["direction"], x["reason"]) for x in record["left_out"]]
    assert left == [("mine", d, "RuntimeError: lost") for d in ("fwd", "bwd")]


def test_damage_to_the_inputs_is_refused(timed):
    def spoils(x, w, b, eps=1e-5):
        y = plain(x, w, b, eps)
        x.detach()[0, 0] += 1
        return y

    assert "inputs changed x" in refusal(timed(spoils))
    checked = threading.Event()

    def spoils_later(x, w, b, eps=1e-5):
        y = plain(x, w, b, eps)
        if checked.is_set():
            b.detach()[0] += 1
        return y

    assert refusal(timed(spoils_later, checked=checked)).startswith("wrote to its inputs: b")


def test_a_time_under_the_floor_is_refused(timed, monkeypatch):
    monkeypatch.setattr(bench_module.roofline, "floor_ms", lambda *_: 1e3)
    record = timed(plain)
    assert record["entries"] == []
    assert all("under the chip's floor of 1e+03 ms" in x["reason"] for x in record["left_out"])


def test_the_floor_is_nominal_and_the_roof_measured():
    # 4.8 GB at 4.8 TB/s is a millisecond, and so are 989 GFLOP
    assert roofline.floor_ms("NVIDIA H200", "bfloat16", 4.8e9, 1e9) == pytest.approx(1.0)
    assert roofline.floor_ms("NVIDIA H200", "bfloat16", 1e6, 989e9) == pytest.approx(1.0)
    assert roofline.floor_ms("Some Processor", "float32", 1e9, 1e9) is None
    assert roofline.roof(CEILINGS, "float32", 1 << 20, 1e3) == (
        pytest.approx((1 << 20) / 1e7),
        "copy",
    )
    # between two sizes by the logarithm of the size
    assert copy_gb_s(CEILINGS, 1 << 15) == pytest.approx(5.5)
    assert roofline.roof(CEILINGS, "float32", 1024, 1e9) == (pytest.approx(10.0), "matrix")
    assert roofline.roof(CEILINGS, "float32", 1024, 1e3, 0.5) == (0.5, "latency")
    assert roofline.roof(CEILINGS, "float16", 1024, 1e3) == (None, None)
    other = {**CEILINGS, "exp_t_s": 0.00103}
    assert roofline.drift(CEILINGS, other) == pytest.approx(0.03)
    # of the copies, the large ones
    small, large = ({**CEILINGS, "copy_gb_s": {str(1 << n): 2.0}} for n in (20, 27))
    assert roofline.drift({**CEILINGS, "copy_gb_s": {str(1 << 20): 1.0}}, small) == 0
    assert roofline.drift({**CEILINGS, "copy_gb_s": {str(1 << 27): 1.0}}, large) == 1


def test_a_drift_of_the_ceilings_marks_every_entry(timed, monkeypatch):
    answers = iter([dict(CEILINGS), {**CEILINGS, "exp_t_s": 0.0011}])
    record = timed(plain)
    assert not any("drifted" in mark for e in record["entries"] for mark in e["marks"])
    monkeypatch.setattr(bench_module.ceilings, "measure", lambda *_: next(answers))
    run = bench_module._Run(["layer_norm"], "quick", None, None, "fwd", "cpu", 2, 0, lambda _: None)
    record = run.into(CHECKOUT / "runs" / "test-drift")
    assert record["entries"]
    assert all("ceilings drifted by 10.0%" in e["marks"] for e in record["entries"])


def test_a_spent_budget_says_what_is_left_out_and_leaves_a_record(timed, tmp_path):
    record = timed(plain, budget_s=1e-3)
    assert record["complete"]
    assert record["entries"] == []
    assert {x["reason"] for x in record["left_out"]} == {"the time budget of 0.001 s was spent"}
    jsonschema.validate(load_record(tmp_path / "out"), SCHEMA)


def test_a_run_that_is_cut_leaves_a_valid_record(timed, tmp_path, monkeypatch):
    def cut(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(bench_module._Run, "_close", cut)
    with pytest.raises(KeyboardInterrupt):
        timed(plain)
    record = load_record(tmp_path / "out")
    jsonschema.validate(record, SCHEMA)
    assert not record["complete"]
    assert set(times(record)) == {"plain", "mine"}


def test_an_op_without_a_kernel_has_a_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_module.ceilings, "measure", lambda *_: dict(CEILINGS))
    record = bench(["linear"], out=tmp_path, budget_s=2, providers=["gaugeblock"], say=print)
    assert {x["reason"] for x in record["left_out"]} == {CATALOG["linear"].kernel}


def test_an_exception_is_a_reason(timed):
    def breaks(x, w, b, eps=1e-5):
        raise RuntimeError("no kernel\nfor this")

    record = timed(breaks)
    assert set(times(record)) == {"plain"}
    # it has not answered: it may lack the case
    assert [(x["reason"], x["refused"]) for x in record["left_out"]] == [
        ("RuntimeError: no kernel … for this", False)
    ]


def test_the_interval_of_the_median():
    samples = timing.Samples()
    samples.ms = list(np.arange(1.0, 102.0))
    # order statistics 40 and 62 of 101
    assert samples.median == 51.0
    assert samples.interval == pytest.approx(11 / 51)
    samples.ms = [1.0] * 5
    assert samples.interval is None and not samples.settled
    samples.ms = [1.0] * timing.LEAST_SAMPLES
    assert samples.interval == 0.0 and samples.settled


def test_the_interval_holds_the_median_as_often_as_it_says():
    rng, held = np.random.default_rng(0), 0
    for _ in range(1000):
        samples = timing.Samples()
        samples.ms = list(rng.lognormal(size=41))
        held += abs(samples.median - 1.0) <= 2 * samples.interval * samples.median
    assert held / 1000 > 0.95


def test_the_plan_takes_the_valuable_first():
    names = [(op.name, case.name) for op, case in planned((), "full", "cuda")]
    tags = [
        sorted(c.tags & {"family", "large", "sweep"})[0] for _, c in planned((), "full", "cuda")
    ]
    assert tags == sorted(tags, key=("family", "large", "sweep").index)
    firsts = {op for op, _ in names[: len({op for op, _ in names})]}
    assert len(firsts) >= 10
    assert {c.name for _, c in planned(["attention"], "quick", "cpu")} == {"cpu_bench", "cpu_full"}
    with pytest.raises(ValueError, match="suite must be one of quick, full, got 'fast'"):
        planned((), "fast", "cpu")


@pytest.mark.parametrize("op", CATALOG)
def test_every_timed_case_has_a_smaller_one(op):
    row = CATALOG[op]
    for case in row.cases:
        if "bench" in case.tags:
            smaller = sibling(row, case)
            assert smaller is not None
            before, after = row.dims(case), row.dims(smaller)
            assert all(after[d] <= before[d] for d in before) and after != before


def test_the_command_says_whether_our_own_kernel_was_refused(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from gaugeblock.benchmarks.providers import Provider\n"
        "from gaugeblock.kernels import eager\n"
        "mine = Provider('mine', '1', {'layer_norm': lambda x, w, b, eps=1e-5: 1.01 * x})\n"
    )
    me = ("-c", "user.name=n", "-c", "user.email=e@localhost")
    for command in (("init", "-q"), ("add", "."), ("commit", "-qm", "mine")):
        subprocess.run(["git", *me, *command], cwd=tmp_path, check=True)
    arguments = ("layer_norm", "--direction", "fwd", "--budget-s", "8", "--out", "out")
    ran = gaugeblock("bench", *arguments, "--providers", "mine:mine,gaugeblock", cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    record = load_record(tmp_path / "out")
    assert set(times(record)) == {"gaugeblock"}
    mine = record["providers"]["mine"]
    assert mine["commit"] == git(tmp_path, "rev-parse", "HEAD") != record["commit"]
    assert mine["dirty"] is False
    assert [x["reason"][:6] for x in record["left_out"] if x["refused"]] == ["wrong "]
    assert "layer_norm fwd" in ran.stdout
    broken = (
        "from gaugeblock import kernels\n"
        "kernels.layer_norm = lambda x, w, b, eps=1e-5, impl='auto': 1.01 * x\n"
        "import sys\n"
        "from gaugeblock.__main__ import main\n"
        f"sys.argv = ['gaugeblock', 'bench', *{arguments!r}, '--providers', 'gaugeblock']\n"
        "main()\n"
    )
    ran = python("-c", broken, cwd=tmp_path)
    assert ran.returncode == 1, ran.stdout + ran.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("norm",), "op must be one of"),
        (("--suite", "fast"), "suite must be one of quick, full, got 'fast'"),
        (("--dtype", "int8"), "dtype must be one of float32, float16, bfloat16, got 'int8'"),
        (("--direction", "up"), "direction must be fwd, bwd or both, got 'up'"),
        (("--budget-s", "-1"), "budget-s must be more than 0, got -1"),
        (("--providers", "nobody"), "provider must be one of"),
    ],
)
def test_bad_input_is_one_line(arguments, message, tmp_path):
    ran = gaugeblock("bench", *arguments, cwd=tmp_path)
    assert ran.returncode == 2
    assert message in ran.stderr and ran.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "must hold JSON"), ("[]", "must have schema 1"), ('{"schema": 2}', "must have schema 1"),
     ('{"schema": 1}', "must hold device, driver")],
)  # fmt: skip
def test_what_is_no_record_is_refused(content, message, tmp_path):
    (tmp_path / "record.json").write_text(content)
    with pytest.raises(ValueError, match=message) as caught:
        load_record(tmp_path)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="must be readable"):
        load_record(tmp_path / "nothing")


def test_pytest_benchmark_knows_the_device(tmp_path):
    """Its storage is the device's own, and another device's record is no baseline."""
    chosen = "layer_norm-cpu_bench-fwd-torch_eager and not residual"
    flags = ("benchmarks", "-q", "-n", "0", "-k", chosen, f"--benchmark-storage={tmp_path}")
    # under xdist the plugin measures nothing
    alone = {"PYTEST_XDIST_WORKER": None}
    ran = python("-m", "pytest", *flags, "--benchmark-save=a", **alone)
    assert ran.returncode == 0, ran.stdout[-2000:]
    (path,) = tmp_path.rglob("*_a.json")
    saved = json.loads(path.read_text())
    device = saved["machine_info"]["device"]
    assert path.is_relative_to(tmp_path / slug(device))
    (test,) = saved["benchmarks"]
    assert test["extra_info"]["provider"] == "torch_eager"
    assert test["extra_info"]["bytes"] > 0 and test["extra_info"]["percent_of_roof"] > 0
    ran = python("-m", "pytest", *flags, "--benchmark-compare=0001", **alone)
    assert ran.returncode == 0, ran.stdout[-2000:]
    saved["machine_info"]["device"] = "Another GPU"
    path.write_text(json.dumps(saved))
    ran = python("-m", "pytest", *flags, "--benchmark-compare=0001", **alone)
    assert ran.returncode != 0
    assert "device must be the same in both records" in ran.stdout + ran.stderr


def test_the_timer_of_pytest_benchmark_goes_on_by_what_the_clock_measured():
    class Clock:
        def flush(self):
            pass

        def time(self, call):
            call()
            return "token"

        def milliseconds(self, tokens):
            return [250.0 for _ in tokens]

    timer, calls = AdvancingTimer("cpu"), []
    timer.clock = Clock()
    run = timer.timed(lambda: calls.append(1))
    assert timer() == 0.0
    run()
    run()
    assert timer() == 0.5 and len(calls) == 2


def test_the_commands_for_ceilings_and_reports(timed, tmp_path):
    ran = gaugeblock("ceilings", "--budget-s", "2", "--json", "c/ceilings.json", cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    found = json.loads((tmp_path / "c" / "ceilings.json").read_text())
    jsonschema.validate(found, SCHEMA["$defs"]["ceilings"])
    assert f"{found['matrix_tflop_s']['float32']:.3f} TFLOP/s" in ran.stdout
    timed(plain)
    ran = gaugeblock("report", "out", "--markdown", "r/s.md", "--html", "r/p.html", cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split() == ["r/s.md", "r/p.html"]
    assert "layer_norm fwd" in (tmp_path / "r" / "s.md").read_text()
    ran = gaugeblock("report", "nothing", cwd=tmp_path)
    assert ran.returncode == 2 and ran.stderr.count("\n") == 1


class _Nvml:
    """What Telemetry asks of NVML, from a card that is hot and held back by its power limit."""

    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0

    class NVMLError(Exception):
        pass

    def __init__(self):
        self.millijoules = 5_000

    def nvmlDeviceGetTotalEnergyConsumption(self, handle):
        return self.millijoules

    def nvmlDeviceGetPowerUsage(self, handle):
        return 650_000

    def nvmlDeviceGetClockInfo(self, handle, which):
        return {1: 1755, 2: 3201}[which]

    def nvmlDeviceGetTemperature(self, handle, sensor):
        raise self.NVMLError("not supported")

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle):
        return 0x4 | 0x1 | 0x40


def test_telemetry_says_what_slows_the_chip():
    found = Telemetry("cpu")
    assert found.sample() == {} and found.energy_j() is None
    found.nvml, found.handle = _Nvml(), "card"
    assert found.energy_j() == 5.0
    sample = found.sample()
    # what the card does not tell is left out, and being idle is no reason
    assert sample == {
        "sm_mhz": 1755, "memory_mhz": 3201, "power_w": 650.0,
        "slowed_by": ["sw_power_cap", "hw_thermal_slowdown"],
    }  # fmt: skip
    cooler = {"sm_mhz": 1980, "temperature_c": 61, "slowed_by": []}
    assert summed_up([sample, cooler]) == {
        "sm_mhz": [1755, 1980], "memory_mhz": [3201, 3201], "power_w": [650.0, 650.0],
        "temperature_c": 61, "slowed_by": ["hw_thermal_slowdown", "sw_power_cap"],
    }  # fmt: skip
    assert summed_up([{}]) == {}


on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.gpu
@on_a_gpu
def test_the_bench_on_a_gpu(tmp_path):
    """Graphs, both directions, telemetry; work on another stream is refused."""

    def aside(x, w, b, eps=1e-5):
        stream, y = torch.cuda.Stream(), torch.empty_like(x)
        with torch.cuda.stream(stream):
            torch.cuda._sleep(10_000_000)
            y.copy_(plain(x, w, b, eps))
        return y

    def waits(x, w, b, eps=1e-5):
        return plain(x, w, b, eps) * float(w.sum().isfinite().item())

    ours, _ = load_providers("cuda", ["gaugeblock", "torch_eager"])
    theirs = [Provider(f.__name__, "1", {"layer_norm": f}) for f in (aside, waits)]
    with patch.object(bench_module, "load_providers", lambda *_: ([*ours, *theirs], {})):
        record = bench(["layer_norm"], out=tmp_path, budget_s=60)
    jsonschema.validate(load_record(tmp_path), SCHEMA)
    graphs = {(e["provider"], e["direction"]): e["graph"] for e in record["entries"]}
    assert graphs["gaugeblock", "fwd"] and graphs["gaugeblock", "bwd"]
    assert graphs["torch_eager", "fwd"] and graphs["torch_eager", "bwd"]
    assert graphs.get(("waits", "fwd")) is False
    assert not [p for p, _ in graphs if p == "aside"]
    assert record["machine"]["clock_overhead_ms"] > 0 and record["complete"]
