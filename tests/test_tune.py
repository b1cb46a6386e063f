"""`gaugeblock tune` puts faster launch configurations that are right into the table, no others."""

import json
import math
import re

import pytest
import torch
from gaugeblock.kernels import _configurations, tune
from gaugeblock.kernels._attention import configuration, launchers
from gaugeblock.kernels.candidates import Problem, attention

from tests.helpers import gaugeblock, python

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROWS = _configurations.rows("attention")
ONE = {"head_dim": [64], "causal": [True], "queries": ["few"], "kernel": ["dq"]}
KERNELS = ("forward", "dkdv", "dq")


def launch(BLOCK_M, BLOCK_N, num_warps=4, num_stages=1, TMA=False):
    return dict(zip(attention.LAUNCH, (BLOCK_M, BLOCK_N, num_warps, num_stages, TMA)))


A, B = launch(16, 16), launch(16, 32)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A copy of the tables; few candidates, and a shape that the interpreter walks at once."""
    _configurations.write("attention", ROWS, tmp_path)
    monkeypatch.setattr(attention, "candidates", lambda row: [own(row), A, B])
    monkeypatch.setattr(attention, "representative_shape", lambda D, queries: (1, 1, 1, 8, 32, D))
    return tmp_path


def own(row):
    return {name: row[name] for name in attention.LAUNCH}


def table(folder):
    return json.loads((folder / "attention.json").read_text())


def key_of(kernel):
    sizes = {"head_dim": 64, "bits": 16, "causal": True, "queries": "few"}
    return {"kernel": kernel, "architecture": _configurations.architecture()} | sizes


def on_trial(kernel):
    """How the row that is measured would be launched now."""
    return own(_configurations.find("attention", **key_of(kernel)))


def clock(times, kernel="dq"):
    """A timer that runs the call and knows how long each configuration takes; 1 ms if not said."""

    def measure(fn):
        fn()
        found = [ms for chosen, ms in times if chosen == on_trial(kernel)]
        return found[0] if found else 1.0

    return measure


def changed(folder):
    """The rows that differ from the shipped ones."""
    return [new for old, new in zip(ROWS, table(folder), strict=True) if new != old]


def spoil(monkeypatch, spoiled, kernel="dq", when=lambda arguments: True):
    """What `spoiled` does to the gradients of launches under configuration A."""
    backward = launchers.backward

    def wrong(*arguments):
        gradients = backward(*arguments)
        if on_trial(kernel) == A and when(arguments):
            gradients = spoiled(*gradients)
        return gradients

    monkeypatch.setattr(launchers, "backward", wrong)


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_fastest_takes_the_place_of_its_row_and_of_no_other(folder, kernel):
    measure = clock([(A, 0.8), (B, 0.5)], kernel)
    (outcome,) = tune.tune("attention", only=ONE | {"kernel": [kernel]}, measure=measure,
                           folder=folder)  # fmt: skip
    assert (outcome["shipped_ms"], outcome["best_ms"], outcome["replaced"]) == (1.0, 0.5, True)
    (row,) = changed(folder)
    assert own(row) == outcome["configuration"] == B
    assert row["time_ms"] == 0.5
    assert "triton" in row["measured"]
    assert {name: row[name] for name in attention.KEY} == outcome["key"]
    assert (row["kernel"], row["head_dim"], row["queries"]) == (kernel, 64, "few")


def test_the_other_kernels_are_launched_as_the_table_says(folder):
    """dkdv and dq are timed together: what dq would gain is not put down to dkdv."""
    only = ONE | {"kernel": ["dkdv", "dq"]}
    outcomes = tune.tune("attention", only=only, measure=clock([(B, 0.5)], "dq"), folder=folder)
    assert [x["key"]["kernel"] for x in outcomes if x["replaced"]] == ["dq"]
    assert [(row["kernel"], own(row) == B) for row in changed(folder)] == [
        ("dkdv", False), ("dq", True),
    ]  # fmt: skip


def test_what_is_faster_by_one_percent_is_noise(folder):
    log = folder / "log.json"
    measure = clock([(A, 0.991)])
    (outcome,) = tune.tune("attention", only=ONE, measure=measure, folder=folder, log=log)
    assert not outcome["replaced"]
    assert [x["time_ms"] for x in json.loads(log.read_text())] == [1.0, 0.991, 1.0]
    (row,) = changed(folder)
    assert {k: v for k, v in row.items() if k not in ("measured", "time_ms")} in ROWS
    assert row["time_ms"] == 1.0


def test_one_that_is_fast_once_only_is_not_taken(folder):
    times = iter([1.0, 0.5, 1.0, 1.0, 1.0])
    (outcome,) = tune.tune("attention", only=ONE, measure=lambda fn: next(times), folder=folder)
    assert not outcome["replaced"]
    assert next(times, None) is None


WRONG = {
    "a thirtieth off": lambda dq, dk, dv: (1.03 * dq, dk, dv),
    "NaN": lambda dq, dk, dv: (dq, dk, torch.full_like(dv, float("nan"))),
    "zeros": lambda dq, dk, dv: (dq, torch.zeros_like(dk), dv),
}


@pytest.mark.parametrize("name", WRONG)
def test_the_fastest_is_refused_where_it_is_wrong(folder, monkeypatch, name):
    spoil(monkeypatch, WRONG[name])
    log = folder / "deep" / "log.json"
    (outcome,) = tune.tune("attention", only=ONE, measure=clock([(A, 0.1)]), folder=folder, log=log)
    assert not outcome["replaced"]
    (attempt,) = [x for x in json.loads(log.read_text()) if x["candidate"] == A]
    assert attempt["time_ms"] is None
    assert attempt["reason"].startswith("wrong: d")


def test_one_that_is_wrong_with_dropout_alone_is_refused(folder, monkeypatch):
    spoil(monkeypatch, WRONG["zeros"], when=lambda arguments: arguments[-3] > 0)
    log = folder / "log.json"
    measure = clock([(A, 0.1), (B, 0.5)])
    (outcome,) = tune.tune("attention", only=ONE, measure=measure, folder=folder, log=log)
    assert outcome["configuration"] == B
    first, second = (x for x in json.loads(log.read_text()) if x["candidate"] == A)
    assert (first["checked"], first["time_ms"]) == ("plain", 0.1)
    assert (second["checked"], second["time_ms"]) == ("harder", None)


def test_one_that_does_not_run_is_skipped_and_logged(folder, monkeypatch):
    def fails(*gradients):
        raise RuntimeError("out of resource: shared memory\nmore")

    spoil(monkeypatch, fails)
    log = folder / "log.json"
    (outcome,) = tune.tune("attention", only=ONE, measure=clock([(B, 0.5)]), folder=folder, log=log)
    assert outcome["configuration"] == B
    attempts = json.loads(log.read_text())
    (attempt,) = [x for x in attempts if x["candidate"] == A]
    assert attempt["reason"] == "RuntimeError: out of resource: shared memory"
    assert all(set(x) == {"key", "candidate", "checked", "time_ms", "reason"} for x in attempts)
    assert all((x["time_ms"] is None) == (x["reason"] is not None) for x in attempts)


def test_a_row_that_does_not_run_itself_stays(folder):
    def measure(fn):
        raise MemoryError("no")

    (outcome,) = tune.tune("attention", only=ONE, measure=measure, folder=folder)
    assert outcome["reason"] == "the table's own row: MemoryError: no"
    assert outcome["best_ms"] is None
    assert not changed(folder)


def test_an_interrupt_keeps_the_rows_that_were_done(folder):
    def measure(fn, rows=[]):  # noqa: B006
        rows.append(1)
        if len(rows) > 3:
            raise KeyboardInterrupt
        return 1.0

    with pytest.raises(KeyboardInterrupt):
        tune.tune(
            "attention", only=ONE | {"kernel": ["dq", "dkdv"]}, measure=measure, folder=folder
        )
    assert len(changed(folder)) == 1


def test_without_time_the_table_stays(folder):
    before = (folder / "attention.json").read_bytes()
    log = folder / "log.json"
    outcomes = tune.tune("attention", budget_s=0, measure=None, folder=folder, log=log)
    assert (folder / "attention.json").read_bytes() == before
    assert {outcome["reason"] for outcome in outcomes} == {"not reached within the budget"}
    assert len(outcomes) == 36
    assert not log.exists()


def test_rows_that_nobody_measured_come_first(folder):
    only = ONE | {"kernel": KERNELS}
    order = [row["kernel"] for row in tune.plan("attention", only=only, folder=folder)[1]]
    assert order == ["forward", "dkdv", "dq"]
    tune.tune("attention", only=ONE | {"kernel": ["forward"]}, measure=clock([]), folder=folder)
    order = [row["kernel"] for row in tune.plan("attention", only=only, folder=folder)[1]]
    assert order == ["dkdv", "dq", "forward"]


def test_the_kernels_use_the_new_table_at_once(folder, monkeypatch):
    monkeypatch.setattr(_configurations, "FOLDER", folder)
    try:
        _configurations.find("attention", **key_of("dq"))
        tune.tune("attention", only=ONE, measure=clock([(B, 0.5)]), folder=folder)
        assert own(_configurations.find("attention", **key_of("dq"))) == B
        assert configuration.configuration("dq", 8, 64, torch.bfloat16, True) == B
    finally:
        _configurations.rows.cache_clear()
        _configurations._find.cache_clear()


def test_candidates_are_few_and_unlike_each_other_and_hold_their_row():
    for row in ROWS:
        found = attention.candidates(row)
        assert found[0] == own(row), row
        assert 1 < len(found) <= 16, row
        assert len({tuple(x.items()) for x in found}) == len(found)
        assert row["architecture"] == "sm_90" or not any(x["TMA"] for x in found)
        assert row["queries"] == "many" or {x["BLOCK_M"] for x in found} == {16}
        for x in found:
            assert set(x) == set(attention.LAUNCH)
            sizes = x["BLOCK_M"], x["BLOCK_N"]
            assert all(size >= 16 and size & (size - 1) == 0 for size in sizes)
    hopper = [row for row in ROWS if row["architecture"] == "sm_90" and row["bits"] == 16]
    for row in hopper:
        assert {x["TMA"] for x in attention.candidates(row)} == {False, True}


def test_shapes_are_those_that_the_row_is_for():
    for row in ROWS:
        D, queries = row["head_dim"], row["queries"]
        for x in attention.candidates(row):
            _, H, Hkv, Tq, Tk, padded = attention.odd_shape(D, queries, x, True)
            assert attention.odd_shape(D, queries, x, False) == (1, H, H, Tq, Tk, D)
            assert (Tq <= configuration.FEW_QUERIES) == (queries == "few")
            assert queries == "few" or (Tq > 2 * x["BLOCK_M"] and Tq % x["BLOCK_M"])
            assert Tk > 2 * x["BLOCK_N"]
            assert Tk % x["BLOCK_N"]
            assert Tq <= Tk - 5
            assert 2 * Hkv == H
            assert max(s for s in (0, *configuration.HEAD_DIMS) if s < D) < padded < D
        B, _, _, Tq, _, full = attention.representative_shape(D, queries)
        assert full == D
        assert (Tq <= configuration.FEW_QUERIES) == (queries == "few")
        assert queries == "few" or B * Tq == 16_384


def test_every_table_can_be_measured():
    assert {path.stem for path in _configurations.FOLDER.glob("*.json")} == set(tune.OPS)


REFUSED = [
    (("linear",), {}, f"tune: op must be one of {', '.join(tune.OPS)}, got 'linear'"),
    (("attention",), {"dtype": "int8"}, "tune: dtype must be one of float32, float16, bfloat16"),
    (("attention",), {"only": {"head_dim": [64, 96]}},
     "tune: head_dim must be one of 64, 128, 256, got '96'"),
    (("attention",), {"only": {"kernel": ["bwd"]}},
     "tune: kernel must be one of forward, dkdv, dq, got 'bwd'"),
    (("attention",), {"only": {"queries": ["some"]}},
     "tune: queries must be one of few, many, got 'some'"),
    (("attention",), {"only": {"causal": [0]}}, "tune: causal must be one of true, false, got '0'"),
    (("attention",), {"only": {"bits": [32]}}, "tune: bits must be one of 16, got '32'"),
    (("attention",), {"only": {"num_warps": [4]}},
     "tune: only must be one of kernel, architecture, head_dim, bits, causal, queries, got"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "options", "message"), REFUSED)
def test_what_cannot_be_measured_is_refused(arguments, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        tune.tune(*arguments, **options, measure=clock([]))


def test_only_the_asked_rows_are_planned(folder):
    _, rows = tune.plan("attention", dtype="float32", architecture="sm_80", folder=folder)
    assert len(rows) == 36
    assert {(row["bits"], row["architecture"]) for row in rows} == {(32, "sm_80")}
    _, rows = tune.plan(
        "attention", only={"causal": ["false"], "kernel": ["dq", "forward"]}, folder=folder
    )
    assert len(rows) == 12
    assert not any(row["causal"] or row["kernel"] == "dkdv" for row in rows)


@pytest.mark.skipif(DEVICE != "cpu", reason="needs a machine without a GPU")
def test_the_command_needs_a_gpu():
    ran = gaugeblock("tune", "attention")
    assert ran.returncode == 2
    assert ran.stderr == (
        "gaugeblock: tune: needs a CUDA device, got none; run it on the GPU whose table is to be "
        "measured\n"
    )
    with pytest.raises(ValueError, match="needs a CUDA device, got none"):
        tune.tune("attention")


SHORT = "--kernel", "dq", "--head-dim", "64", "--head-dim", "128", "--no-causal"
GENERAL = [word for field in ("kernel=dq", "head_dim=64", "head_dim=128", "causal=False")
           for word in ("--only", field)]  # fmt: skip


@pytest.mark.parametrize("filters", [SHORT, GENERAL], ids=["short", "general"])
def test_a_dry_run_needs_none(tmp_path, filters):
    ran = gaugeblock("tune", "attention", "--dry-run", "--architecture", "sm_90", *filters,
                     cwd=tmp_path)  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert "attention: 4 rows" in ran.stdout
    lines = [line for line in ran.stdout.splitlines() if "kernel=dq architecture=sm_90" in line]
    assert all("causal=false" in line for line in lines)
    wanted = [row for row in ROWS if (row["kernel"], row["architecture"], row["causal"]) ==
              ("dq", "sm_90", False) and row["bits"] == 16 and row["head_dim"] < 256]  # fmt: skip
    counts = [str(len(attention.candidates(row))) for row in wanted]
    assert [line.split()[-2] for line in lines] == counts
    assert not list(tmp_path.iterdir())


def test_a_filter_must_name_its_value():
    ran = gaugeblock("tune", "attention", "--dry-run", "--architecture", "sm_90", "--only", "dq")
    assert ran.returncode == 2
    assert ran.stderr == "gaugeblock: tune: only must be FIELD=VALUE, got 'dq'\n"


def test_the_command_prints_what_came_of_each_row(monkeypatch, capsys):
    from gaugeblock.__main__ import main

    outcome = {"key": {name: ROWS[0][name] for name in attention.KEY}, "configuration": B,
               "shipped_ms": 2.0, "best_ms": 1.5, "replaced": True, "reason": None}  # fmt: skip
    left = outcome | {"shipped_ms": None, "best_ms": None, "replaced": False, "reason": "no [time]"}
    asked = {}

    def run(op, **options):
        asked.update(options)
        return [outcome, left]

    monkeypatch.setattr(tune, "tune", run)
    with pytest.raises(SystemExit) as end:
        main(["tune", "attention", "--kernel", "dq", "--budget-s", "7", "--causal",
              "--queries", "few", "--only", "kernel=forward", "--only", "bits=16"])  # fmt: skip
    assert end.value.code == 0
    printed = capsys.readouterr().out
    assert "1 of 2 rows replaced" in printed
    assert all(word in printed for word in ("1.5", "0.750", "BLOCK_N=32", "no [time]"))
    assert asked.pop("log").as_posix() == "runs/tune/attention.json"
    only = {"kernel": ["forward", "dq"], "bits": ["16"], "queries": ["few"], "causal": ["true"]}
    assert asked == {"dtype": "bfloat16", "only": only, "budget_s": 7.0}


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


def test_a_table_is_written_whole_or_not_at_all(folder, monkeypatch):
    before = (folder / "attention.json").read_bytes()

    def fails(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(_configurations.os, "replace", fails)
    with pytest.raises(KeyboardInterrupt):
        _configurations.write("attention", ROWS[:1], folder)
    assert (folder / "attention.json").read_bytes() == before


def smallest(rows, module):
    """The row with the smallest tile, which the interpreter walks soonest."""
    sizes = [name for name in module.LAUNCH if name.startswith("BLOCK")]
    return min(rows, key=lambda row: math.prod(row[name] or 1 for name in sizes))


def shipped():
    """[(op, kernel)]: every kernel of a table, once."""
    rows = ((op, row["kernel"]) for op in tune.OPS for row in _configurations.rows(op))
    return list(dict.fromkeys(rows))


@pytest.mark.parametrize(("op", "kernel"), shipped())
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
from gaugeblock.kernels import _configurations, inspect, tune
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
