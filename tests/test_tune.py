"""`gaugeblock tune` puts faster launch configurations that are right into the table, no others."""

import json
import re

import pytest
import torch
from gaugeblock.kernels import _configurations, tune
from gaugeblock.kernels._attention import configuration, launchers
from gaugeblock.kernels.candidates import attention

from tests.helpers import gaugeblock

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
