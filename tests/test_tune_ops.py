"""`gaugeblock tune` with any op: what a module of candidates must have, and what is made of it."""

import json
import math

import pytest
import torch
from gaugeblock.kernels import _configurations, tune
from gaugeblock.kernels.candidates import Problem

from tests.helpers import python

INVENTED = [
    {"kernel": kernel, "architecture": _configurations.architecture(), "padded": padded, "BLOCK": 1}
    for kernel in ("double", "sum")
    for padded in (True, None)
]  # fmt: skip


class Invented:
    """A module of candidates for an op that has neither a dtype in its key nor a harder problem."""

    KEY, LAUNCH = ("kernel", "architecture", "padded"), ("BLOCK",)
    spoil = staticmethod(lambda answers: answers)
    looks_up = "double"

    @staticmethod
    def candidates(row):
        return [{"BLOCK": row["BLOCK"]}, {"BLOCK": 2}]

    @classmethod
    def problem(cls, row, dtype, device, candidate=None):
        x = torch.linspace(-1, 1, 7 if candidate else 64, dtype=dtype, device=device)
        index = torch.arange(len(x), device=device)

        def answers():
            key = {name: row[name] for name in cls.KEY} | {"kernel": cls.looks_up}
            BLOCK = _configurations.find("invented", **key)["BLOCK"]
            answers = x * 2, x.float().sum(), index + 1, torch.zeros_like(x)
            return answers if BLOCK == 1 else cls.spoil(answers)

        def twin(x, index):
            return x * 2, x.sum(dtype=x.dtype), index + 1, torch.zeros_like(x)

        return Problem(("y", "sum", "next", "zeros"), (x, index), answers, answers, twin)


@pytest.fixture
def invented(tmp_path, monkeypatch):
    class Mine(Invented):
        pass

    _configurations.write("invented", INVENTED, tmp_path)
    monkeypatch.setattr(tune, "OPS", ("invented",))
    monkeypatch.setattr(tune, "import_module", lambda name, package: Mine)

    def measure(fn):
        fn()
        key = {name: INVENTED[0][name] for name in Mine.KEY}
        return 1 / _configurations.find("invented", **key)["BLOCK"]

    def run(measure=measure, only={"kernel": ["double"], "padded": ["true"]}):  # noqa: B006
        log = tmp_path / "log.json"
        (outcome,) = tune.tune("invented", only=only, measure=measure, folder=tmp_path, log=log)
        return outcome, json.loads(log.read_text())

    Mine.run = staticmethod(run)
    return Mine


def test_an_op_with_another_key_and_no_harder_problem(invented):
    outcome, attempts = invented.run()
    assert outcome["configuration"] == {"BLOCK": 2}
    assert outcome["key"] == {name: INVENTED[0][name] for name in Invented.KEY}
    assert [x["checked"] for x in attempts] == ["plain"] * 4
    outcome, _ = invented.run(only={"kernel": ["double"], "padded": [None]})
    assert outcome["key"]["padded"] is None


@pytest.mark.parametrize(
    ("budget_s", "taken", "reasons"),
    [(15, 0, ("not finished", "not reached")), (35, 1, (None, "not reached")),
     (45, 1, (None, "not finished"))],
)  # fmt: skip
def test_a_row_that_is_not_finished_stays(
    invented, tmp_path, monkeypatch, budget_s, taken, reasons
):
    """Two rows; each measurement takes 10 s: two of candidates, two of the recheck."""
    now = [0.0]
    monkeypatch.setattr(tune.time, "monotonic", lambda: now[0])

    def measure(fn):
        now[0] += 10
        fn()
        rows = ({name: row[name] for name in Invented.KEY} for row in INVENTED[:2])
        return min(1 / _configurations.find("invented", **key)["BLOCK"] for key in rows)

    outcomes = tune.tune(
        "invented", only={"kernel": ["double"]}, budget_s=budget_s, measure=measure, folder=tmp_path
    )
    said = [f"{reason} within the budget" if reason else None for reason in reasons]
    assert [outcome["reason"] for outcome in outcomes] == said
    table = json.loads((tmp_path / "invented.json").read_text())
    assert [row["BLOCK"] for row in table[:2]] == [2] * taken + [1] * (2 - taken)
    assert ["measured" in row for row in table] == [True] * taken + [False] * (4 - taken)


SPOILED = {
    "errs": (lambda y, s, n, z: (y * 1.1, s, n, z), "wrong: y errs by"),
    "an integer": (lambda y, s, n, z: (y, s, n + (n == 3), z), "wrong: next errs by 1, the twin"),
    "not zero": (lambda y, s, n, z: (y, s, n, z + 1e-6), "wrong: zeros errs by"),
    "a shape": (lambda y, s, n, z: (y, s.expand(2), n, z), "wrong: sum has shape (2,), the"),
    "one too few": (lambda y, s, n, z: (y, s, n), "ValueError: zip() argument 2 is shorter"),
}


@pytest.mark.parametrize("name", SPOILED)
def test_all_that_an_op_answers_is_checked(invented, name):
    spoiled, said = SPOILED[name]
    invented.spoil = staticmethod(lambda answers: spoiled(*answers))
    outcome, attempts = invented.run()
    assert not outcome["replaced"]
    assert outcome["reason"] is None
    assert attempts[1]["reason"].startswith(said)


def test_a_problem_that_launches_other_rows_is_no_measurement(invented, monkeypatch):
    invented.looks_up = "sum"
    outcome, _ = invented.run()
    assert outcome["reason"] == "the table's own row: what is checked launches other rows"
    invented.looks_up = "double"
    problem = invented.problem

    def other_when_timed(*arguments):
        found = problem(*arguments)
        key = {name: INVENTED[2][name] for name in Invented.KEY}
        return found._replace(timed=lambda: _configurations.find("invented", **key))

    monkeypatch.setattr(invented, "problem", other_when_timed)
    outcome, _ = invented.run(measure=lambda fn: fn() and 1.0)
    assert outcome["reason"] == "the table's own row: what is timed launches other rows"


def test_a_table_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    _configurations.write("invented", INVENTED, tmp_path)
    before = (tmp_path / "invented.json").read_bytes()

    def fails(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(_configurations.os, "replace", fails)
    with pytest.raises(KeyboardInterrupt):
        _configurations.write("invented", INVENTED[:1], tmp_path)
    assert (tmp_path / "invented.json").read_bytes() == before
    assert json.loads(before) == INVENTED


def smallest(rows, module):
    """The row with the smallest tile, which the interpreter walks soonest."""
    sizes = [name for name in module.LAUNCH if name.startswith("BLOCK")]
    return min(rows, key=lambda row: math.prod(row[name] or 1 for name in sizes))


def shipped():
    """[(op, kernel)]: every kernel of a table, once."""
    rows = ((op, row["kernel"]) for op in tune.OPS for row in _configurations.rows(op))
    return list(dict.fromkeys(rows))


# hundreds of programs, one by one in the interpreter
LONG = [(op, k) for op in ("layer_norm", "residual_layer_norm") for k in ("dx", "columns", "dwdb")]


@pytest.mark.parametrize(
    ("op", "kernel"),
    [pytest.param(*x, marks=[pytest.mark.slow] if x in LONG else []) for x in shipped()],
)
def test_a_modules_problem_is_right_as_shipped(op, kernel):
    module, table = tune.module(op), _configurations.rows(op)
    _, rows = tune.plan(op, only={"kernel": [kernel]})
    row = smallest(rows, module)
    (row,) = (x for x in table if x == row)
    bench = tune._Bench(op, module, table, row, torch.bfloat16, lambda fn: 1.0, [])
    for harder in {False, bench.has_harder}:
        assert bench._wrong(bench.own, harder) is None


@pytest.mark.parametrize("op", tune.OPS)
def test_a_modules_candidates_are_of_its_table(op):
    module = tune.module(op)
    for row in _configurations.rows(op):
        assert {*module.KEY, *module.LAUNCH} == {*row} - {"measured", "time_ms"}
        first, *others = module.candidates(row)
        assert first == {name: row[name] for name in module.LAUNCH}
        assert first not in others
        assert all(set(x) == set(module.LAUNCH) for x in others)
        assert all(others.count(x) == 1 for x in others)
    keys = [tuple(row[name] for name in module.KEY) for row in _configurations.rows(op)]
    assert len(set(keys)) == len(keys)


AHEAD = """
import torch, triton
from gaugeblock.kernels import _configurations, tune
from gaugeblock.kernels.inspect import compiling as inspect
from gaugeblock.kernels.candidates import attention

compiled, launched = [], []
triton.knobs.compilation.listener = lambda metadata, **_: compiled.append(metadata["hash"])
run = triton.runtime.JITFunction.run

def launch(kernel, *args, warmup, **options):
    found = run(kernel, *args, warmup=True, **options)
    if not warmup:
        launched.append(found)
        getattr(found, "result", lambda: None)()

# as on a GPU, but for the launch itself: tensors with addresses, and a driver that names the chip
triton.runtime.JITFunction.run = launch
triton.runtime.driver.set_active(inspect._Driver(inspect.TARGETS["sm_90"]))
attention.representative_shape = lambda D, queries: (1, 1, 1, 16, 64, D)
table = _configurations.rows("attention")
key = {"kernel": "dq", "architecture": "sm_90", "head_dim": 64, "bits": 16, "causal": True,
       "queries": "few"}
row = next(row for row in table if key.items() <= row.items())
bench = tune._Bench("attention", attention, table, row, torch.bfloat16, lambda fn: fn() or 1.0, [])
bench.device = "cpu"
fails = dict(BLOCK_M=16, BLOCK_N=32, num_warps=3, num_stages=1, TMA=False)
candidates = [bench.own, fails | {"num_warps": 4}, fails]
bench.call
at_first = len(launched)
bench.compile_ahead(candidates, lambda: False)
assert triton.runtime.JITFunction.run is launch
print(len(launched) - at_first, len(compiled) == len(set(compiled)), end=" ")
before = len(compiled)
reasons = []
for candidate in candidates:
    bench.attempt(candidate)
    reasons.append(bench.attempts[-1]["reason"])
for candidate in candidates[:2]:
    with bench._trial(candidate):
        bench.call()
reasons = [reason.split(":")[0] for reason in reasons]
print(len(launched) > at_first, len(compiled) - before, *reasons)
"""


def test_what_is_compiled_ahead_is_what_is_launched(tmp_path):
    ran = python("-W", "ignore", "-c", AHEAD, TRITON_CACHE_DIR=str(tmp_path))
    assert ran.returncode == 0, ran.stderr
    # nothing launched meanwhile, nothing compiled twice, nothing left to compile; nothing ran, so
    # that answers are wrong; the last does not compile
    assert ran.stdout == "0 True True 0 wrong wrong AssertionError\n", ran.stdout
