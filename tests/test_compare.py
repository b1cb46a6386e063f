"""`gaugeblock compare`: intervals, stored records, reports, two commits of a small repository."""

import contextlib
import importlib
import json
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pytest
from gaugeblock.benchmarks import commits, side, timing
from gaugeblock.benchmarks.compare import compare
from gaugeblock.benchmarks.significance import (
    FASTER,
    SAME,
    SLOWER,
    UNKNOWN,
    Interval,
    least_pairs,
    paired,
    unpaired,
)
from gaugeblock.benchmarks.verdicts import CUT, MISSING, NEW, WRONG, Comparison
from scipy import stats

from gaugeblock.__main__ import main
from tests import gate_trials
from tests.helpers import CHECKOUT, gaugeblock
from tests.invented_records import HOSTILE, entry, left_out, record

# statistics


@pytest.mark.parametrize(
    ("ratio", "low", "high", "verdict"),
    [
        (1.05, 1.04, 1.06, SLOWER),
        (1.05, 0.99, 1.11, UNKNOWN),
        (1.01, 1.005, 1.02, SAME),
        # known to be different, and by less than matters
        (1.014, 1.012, 1.05, UNKNOWN),
        (1.016, 1.001, 1.05, SLOWER),
        (1.0, 0.98, 1.029, SAME),
        (1.0, 0.97, 1.02, UNKNOWN),
        (0.95, 0.94, 0.96, FASTER),
        (0.98, 0.96, 0.999, FASTER),
        (1.2, 0.0, math.inf, UNKNOWN),
    ],
)
def test_a_verdict_needs_the_whole_interval(ratio, low, high, verdict):
    assert Interval(ratio, low, high).verdict(0.03) == verdict


@pytest.mark.parametrize("n", [1, 4, 9, 17])
def test_the_paired_interval_is_that_of_the_signed_rank_test(n):
    d = np.random.default_rng(n).standard_normal(n) + 0.7
    for level in (0.5, 0.2, 0.05, 0.01, 1e-3):
        interval = paired(d, level)
        if n < least_pairs(level):
            assert (interval.low, interval.high) == (0, math.inf)
            continue
        # shifted just inside of either end it is not significant, and just outside it is
        for end, outwards in ((interval.low, -1e-9), (interval.high, 1e-9)):
            inside, outside = (
                stats.wilcoxon(d - math.log(end) + shift, method="exact").pvalue
                for shift in (outwards, -outwards)
            )
            assert outside <= level < inside


def test_fewer_pairs_than_the_least_have_no_ends():
    for level in (0.5, 0.05, 1e-4):
        n = least_pairs(level)
        assert 2.0 ** (1 - n) <= level < 2.0 ** (2 - n)
        assert paired(np.full(n - 1, 0.5), level).high == math.inf
        assert paired(np.full(n, 0.5), level).low == pytest.approx(math.exp(0.5))


@pytest.mark.parametrize("noise", ["normal", "cauchy"])
def test_equals_are_seldom_outside_of_the_interval(noise):
    rng = np.random.default_rng(0)
    draws = getattr(rng, f"standard_{noise}")((4000, 12))
    missed = np.mean([not i.low <= 1 <= i.high for i in (paired(d, 0.05) for d in draws)])
    # 4,000 draws know a twentieth to 0.0034, three times over
    assert 0.02 < missed < 0.05 + 3 * 0.0034
    if noise == "normal":
        sides = np.exp(draws[:, :5]), np.exp(2 * draws[:, 5:])
        found = [unpaired(a, b, 0.05) for a, b in zip(*sides)]
        missed = np.mean([not i.low <= 1 <= i.high for i in found])
        assert 0.02 < missed < 0.05 + 3 * 0.0034


def test_the_unpaired_interval_is_welchs():
    rng = np.random.default_rng(1)
    a, b = np.exp(rng.normal(0, 0.1, 6)), np.exp(rng.normal(0.2, 0.3, 9))
    want = stats.ttest_ind(np.log(b), np.log(a), equal_var=False).confidence_interval(0.99)
    found = unpaired(a, b, 0.01)
    assert math.log(found.low) == pytest.approx(want.low, rel=1e-12)
    assert math.log(found.high) == pytest.approx(want.high, rel=1e-12)
    assert unpaired([1.0] * 5, [2.0] * 5, 0.01).verdict(0.03) == UNKNOWN


# records


def runs(folder, factor=1.0, n=6, entries=None, **changes):
    """A folder of runs whose times are scattered by a thousandth: by its name, and the case."""
    of_run = entries or [("wide", 1.0), ("narrow", 0.2)]
    scatter = {
        case: np.random.default_rng([*f"{folder.name} {case}".encode()]).standard_normal(n)
        for case, _ in of_run
    }
    for i in range(n):
        made = [
            entry("gaugeblock", ms * factor * (1 + 1e-3 * scatter[case][i]), case=case)
            for case, ms in of_run
        ]
        made.append(entry("eager", 5.0))
        path = folder / str(i) / "record.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(record(made, **changes)))
    return folder


def verdicts(found):
    return {line.case: line.verdict for line in found.lines}


@pytest.mark.parametrize(
    ("factor", "verdict", "code"),
    [(1.0, SAME, 0), (1.03, SLOWER, 1), (0.97, FASTER, 0), (1.01, SAME, 0)],
)
def test_two_folders_of_runs(tmp_path, factor, verdict, code):
    found = compare(runs(tmp_path / "a"), runs(tmp_path / "bb", factor))
    assert verdicts(found) == {"wide": verdict, "narrow": verdict}
    assert found.exit_code == code
    for line in found.lines:
        assert line.low < line.ratio < line.high
        assert line.ratio == pytest.approx(factor, rel=3e-3)


def test_too_few_runs_say_what_to_do(tmp_path):
    found = compare(runs(tmp_path / "a", n=4), runs(tmp_path / "b", 2.0, n=6))
    assert set(verdicts(found).values()) == {UNKNOWN}
    assert found.exit_code == 2
    assert found.lines[0].runs == (4, 6)
    assert "needs 5 runs a side" in found.lines[0].reason
    one = next((tmp_path / "a").rglob("record.json"))
    assert compare(one, one.parent).exit_code == 2


def test_a_provider_from_elsewhere_has_a_commit_of_its_own(tmp_path):
    def of(folder, *commits):
        for i, commit in enumerate(commits):
            mine = {"version": "1", "reason": None, "commit": commit * 16, "dirty": commit == "b"}
            runs(folder / str(i), n=3, commit="0" * 16, providers={"gaugeblock": mine})
        return folder

    found = compare(of(tmp_path / "a", "a", "a"), of(tmp_path / "b", "b", "b"))
    assert found.about["A"].endswith("6 runs of " + "a" * 12)
    assert found.about["B"].endswith("6 runs of " + "b" * 12 + " with changes")
    with pytest.raises(ValueError, match=r"runs of one commit, got a{12} and b{12} with changes;"):
        compare(of(tmp_path / "mixed", "a", "b"), tmp_path / "a")


def test_the_level_is_shared_by_the_cases(tmp_path):
    def width(folder, others):
        entries = [(f"case{i}", 1.0) for i in range(others)] + [("wide", 1.0)]
        found = compare(*(runs(folder / name, entries=entries) for name in "ab"))
        wide = next(line for line in found.lines if line.case == "wide")
        return math.log(wide.high / wide.low)

    # the times of one case, whose level is a half and a fortieth of the whole's
    assert width(tmp_path / "many", 39) > 1.4 * width(tmp_path / "few", 1)


def test_missing_new_and_cut_cases(tmp_path):
    both, only = ("wide", 1.0), ("narrow", 0.2)
    a, b = runs(tmp_path / "a", entries=[both]), runs(tmp_path / "b", entries=[both, only])
    assert verdicts(compare(a, b)) == {"wide": SAME, "narrow": NEW}
    assert compare(a, b).exit_code == 1
    assert compare(a, b, accept_new=True).exit_code == 0
    assert compare(a, b, accept_missing=True).exit_code == 1
    assert verdicts(compare(b, a)) == {"wide": SAME, "narrow": MISSING}
    assert compare(b, a, accept_missing=True).exit_code == 0
    assert compare(b, a, accept_new=True).exit_code == 1
    reason = left_out("gaugeblock", "the time budget of 5 s was spent", case="narrow")
    cut = runs(tmp_path / "c", entries=[both], left_out=[reason])
    assert verdicts(compare(b, cut)) == {"wide": SAME, "narrow": CUT}
    assert compare(b, cut).exit_code == 2
    # acknowledging what is missing does not acknowledge that nobody had the time
    assert compare(b, cut, accept_missing=True).exit_code == 2
    unfinished = runs(tmp_path / "d", entries=[both], complete=False)
    assert verdicts(compare(b, unfinished))["narrow"] == CUT
    refused = left_out("gaugeblock", "wrong y", case="narrow")
    wrong = compare(b, runs(tmp_path / "e", entries=[both], left_out=[refused]))
    assert wrong.exit_code == 1
    assert "wrong y" in wrong.ordered()[0].reason


def changed(folder, change, which=()):
    """The folder of runs, some of its records (all by default) changed in place."""
    for path in sorted(folder.rglob("record.json")):
        if not which or int(path.parent.name) in which:
            found = json.loads(path.read_text())
            change(found)
            path.write_text(json.dumps(found))
    return folder


def without(*left, complete=True):
    """A change of a record: no time of narrow, with these reasons."""

    def change(found):
        found["entries"] = [e for e in found["entries"] if e["case"] != "narrow"]
        found["left_out"], found["complete"] = list(left), complete

    return change


REFUSED = left_out("gaugeblock", "wrong y", case="narrow") | {"refused": True}
SPENT = left_out(None, "the time budget of 5 s was spent", case="narrow")


def test_what_was_wrong_in_one_run_is_wrong(tmp_path):
    a, b = runs(tmp_path / "a", n=7), changed(runs(tmp_path / "b", n=7), without(REFUSED), {3})
    found = compare(a, b)
    assert verdicts(found) == {"wide": SAME, "narrow": WRONG}
    assert (found.exit_code, found.ordered()[0].reason) == (1, "wrong y")
    assert compare(a, b, accept_new=True, accept_missing=True).exit_code == 1
    # a commit that repairs it has nothing to be compared with
    assert verdicts(compare(b, a)) == {"wide": SAME, "narrow": NEW}
    assert compare(b, a, accept_new=True).exit_code == 0


@pytest.mark.parametrize(
    ("of_a", "of_b", "verdict"),
    [
        (without(SPENT), without(SPENT), CUT),
        (without(SPENT), without(), CUT),
        (without(), without(SPENT), CUT),
        (without(), without(REFUSED), WRONG),
        (without(SPENT), without(REFUSED), WRONG),
        (without(REFUSED), without(SPENT), CUT),
        (without(REFUSED), without(), None),
        (without(), without(), None),
    ],
)
def test_what_no_side_has_a_time_of_is_named(tmp_path, of_a, of_b, verdict):
    found = compare(changed(runs(tmp_path / "a"), of_a), changed(runs(tmp_path / "b"), of_b))
    assert verdicts(found).get("narrow") == verdict
    assert found.exit_code == {CUT: 2, WRONG: 1, None: 0}[verdict]


def test_one_whole_run_settles_that_a_case_is_missing(tmp_path):
    a, b = runs(tmp_path / "a"), changed(runs(tmp_path / "b"), without())
    unfinished = changed(b, without(complete=False), {0, 1})
    assert verdicts(compare(a, unfinished))["narrow"] == MISSING
    assert verdicts(compare(a, changed(b, without(complete=False))))["narrow"] == CUT


def test_another_shape_is_another_case(tmp_path):
    def wider(found):
        for e in found["entries"]:
            e["shape"]["N"] *= 2 if e["case"] == "wide" else 1

    a, b = runs(tmp_path / "a"), changed(runs(tmp_path / "b"), wider)
    found = compare(a, b)
    assert verdicts(found) == {"wide": NEW, "narrow": SAME}
    assert "M=64 N=768 in A, M=64 N=1536 in B" in found.ordered()[0].reason
    assert (found.exit_code, compare(a, b, accept_new=True).exit_code) == (1, 0)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda r: r["entries"].append(r["entries"][0]), "must hold a case once"),
        (lambda r: r["entries"][0]["time_ms"].update(p50=0.0), "times of more than 0 ms, got 0.0"),
        (lambda r: r["entries"][0]["time_ms"].update(p50=math.nan), "more than 0 ms, got nan"),
        (lambda r: r["entries"][0]["time_ms"].update(p50=math.inf), "more than 0 ms, got inf"),
        (lambda r: r["entries"][0].pop("time_ms"), "must hold entries of bench"),
        (lambda r: r.update(started="2026-01-02T03:04:05"), "with a time zone"),
        (lambda r: r.update(started=None), "must say when it started"),
    ],
)
def test_a_damaged_record_is_refused(tmp_path, damage, said):
    a = runs(tmp_path / "a")
    with pytest.raises(ValueError, match=said):
        compare(a, changed(runs(tmp_path / "b"), damage, {2}))


@pytest.mark.parametrize(
    "changes", [{"device": "Other"}, {"driver": "2"}, {"torch": "3.0"}, {"triton": "4"},
                {"machine": {"cores": 4}}, {"machine": {"cores": 2, "threads": 2}}]
)  # fmt: skip
def test_other_machines_are_refused_unless_normalised(tmp_path, changes):
    a, b = runs(tmp_path / "a"), runs(tmp_path / "b", 2.0, **changes)
    with pytest.raises(ValueError, match=r"must be one, got .* and .*--normalise"):
        compare(a, b)
    assert compare(a, b, normalise=True).exit_code == 1


def test_times_are_normalised_by_their_own_ceilings(tmp_path):
    a = runs(tmp_path / "a")
    b = runs(tmp_path / "b", 2.0, device="Half as fast")
    for path in b.rglob("record.json"):
        slow = json.loads(path.read_text())
        for e in slow["entries"]:
            e["roof_ms"] *= 2
        path.write_text(json.dumps(slow))
    assert set(verdicts(compare(a, b, normalise=True)).values()) == {SAME}
    for path in b.rglob("record.json"):
        none = json.loads(path.read_text())
        for e in none["entries"]:
            e["roof_ms"] = None
        path.write_text(json.dumps(none))
    assert "A × roof" in compare(a, a, normalise=True).markdown()
    with pytest.raises(ValueError, match="must hold ceilings"):
        compare(a, b, normalise=True)


def test_bad_input_is_refused_in_one_line(tmp_path, capsys):
    states = tmp_path / "states"
    a, b = runs(states / "a"), runs(states / "b", commit="0" * 16)
    twice = shutil.copytree(a, tmp_path / "else" / "twice")
    shutil.copytree(a / "0", twice / "9")
    (tmp_path / "empty").mkdir()
    for arguments, said in [
        ((states, a), "runs of one commit, got 000000000000 and abcdef012345;"),
        ((twice, a), "must hold runs, got one twice"),
        ((a, tmp_path / "empty"), "must hold a record.json"),
        ((a, tmp_path / "absent"), "must be readable"),
        ((a,), "two records or folders, got 1"),
        ((a, b, "--change", "0"), "change must lie between 0 and 1"),
        ((a, b, "--false-alarm", "2"), "false-alarm must lie between"),
        ((a, b, "--provider", "nobody"), "times of nobody, they hold none"),
        (("--gate", "HEAD", "--normalise"), "goes with records"),
        (("--gate", "no-such-commit"), "gate must name a commit"),
        (("--gate", "HEAD", "--direction", "up"), "direction must be"),
        (("--gate", "HEAD", "--case", "none_such"), "case must be one of"),
        (("--gate", "HEAD", "--dtype", "flaot32"), "dtype must be one of"),
        (("--gate", "HEAD", "--budget-s", "0"), "budget-s must be more than 0"),
        (("--gate", "HEAD", "--provider", "torch_eager"), "provider must be"),
        ((a, a, "--dtype", "float32"), "--dtype goes with --gate, got records"),
        ((a, a, "--no-check"), "--check goes with --gate"),
        ((a, a, "--json", a), "Is a directory"),
    ]:
        with pytest.raises(SystemExit) as exit:
            main(["compare", *map(str, arguments)])
        err = capsys.readouterr().err
        assert exit.value.code == 2
        assert said in err
        assert err.count("\n") == 1


def test_what_is_written_agrees(tmp_path, capsys, monkeypatch):
    summary = tmp_path / "summary.md"
    summary.write_text("before\n")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    cases = [("wide", 1.0), ("narrow", 0.2)]
    a = runs(tmp_path / "a", entries=cases)
    b = runs(tmp_path / "b", 1.1, entries=[*cases, (HOSTILE, 1.0)])
    files = [tmp_path / "out" / name for name in ("x.json", "x.xml", "x.md")]
    options = [f"--{name}={f}" for name, f in zip(("json", "junit", "markdown"), files)]
    with pytest.raises(SystemExit) as exit:
        main(["compare", str(a), str(b), *options])
    assert exit.value.code == 1
    found = json.loads(files[0].read_text())
    assert found["exit_code"] == 1
    assert [line["verdict"] for line in found["lines"]] == [SLOWER, SLOWER, NEW]
    suite = ElementTree.parse(files[1]).getroot()
    assert suite.attrib["failures"] == "3"
    assert len(suite.findall("testcase/failure")) == 3
    text = files[2].read_text()
    assert summary.read_text() == f"before\n{text}"
    assert "2 slower, 1 new of 3 cases: exit code 1" in text
    assert "<script" not in text
    shown = capsys.readouterr().out
    assert "1.10" in shown
    assert "exit code 1" in shown


def test_what_steers_a_terminal_is_not_written(tmp_path, capsys):
    a = runs(tmp_path / "a")
    said = REFUSED | {"reason": "wrong \x1b[31my\x00 at [red]0[/red]"}
    b = changed(runs(tmp_path / "b"), without(said), {2})
    with pytest.raises(SystemExit):
        main(["compare", str(a), str(b), "--junit", str(tmp_path / "x.xml"),
              "--markdown", str(tmp_path / "x.md")])  # fmt: skip
    failure = ElementTree.parse(tmp_path / "x.xml").getroot().find("testcase/failure")
    assert failure.attrib["message"] == "wrong (wrong \ufffd[31my\ufffd at [red]0[/red])"
    for text in (capsys.readouterr().out, (tmp_path / "x.md").read_text()):
        assert "\ufffd" in text
        assert not {"\x1b", "\x00"} & set(text)


def test_what_cannot_be_told_is_an_error_in_junit(tmp_path):
    found = compare(runs(tmp_path / "a", n=4), runs(tmp_path / "b", n=4))
    suite = ElementTree.fromstring(found.junit())
    assert (suite.attrib["errors"], suite.attrib["failures"]) == ("2", "0")
    assert len(suite.findall("testcase/error")) == 2


def test_nothing_compared_is_no_pass():
    assert Comparison([], 0.03, 0.01, {}).exit_code == 2


# commits


def kept_promise(file):
    """(false alarms, trials of equals, planted changes found, trials of them) of a record."""
    trials = json.loads(file.read_text())["trials"]
    equals, planted = ([t for t in trials if t["kind"] == k] for k in ("equals", "planted"))
    alarms = [t for t in equals if {c[0] for c in t["cases"].values()} & {SLOWER, FASTER}]
    return len(alarms), len(equals), sum(t["exit_code"] == 1 for t in planted), len(planted)


def test_the_recorded_trials_keep_the_promise():
    alarms, equals, found, planted = kept_promise(CHECKOUT / "docs" / "compare" / "trials.json")
    assert alarms <= 0.01 * equals
    assert found >= 0.95 * planted
    assert equals >= 100
    assert planted >= 50


@pytest.mark.slow
def test_new_trials_keep_the_promise(tmp_path):
    gate_trials.main(["--equals", "5", "--planted", "5", "--out", str(tmp_path / "trials.json")])
    alarms, equals, found, planted = kept_promise(tmp_path / "trials.json")
    assert (alarms, equals, planted) == (0, 5, 5)
    # on average one in twenty may be missed
    assert found >= 4


def test_our_own_kernels_at_a_commit_and_now(tmp_path):
    """In a copy of the checkout, whose kernels take longer than at its commit, and lack none."""
    for room in ("gaugeblock", "kernels", "reference", "benchmarks", "gpt"):
        shutil.copytree(CHECKOUT / room, tmp_path / room,
                        ignore=shutil.ignore_patterns("__pycache__"))  # fmt: skip
    shutil.copy(CHECKOUT / "pyproject.toml", tmp_path)
    me = ("git", "-c", "user.name=n", "-c", "user.email=e@localhost")
    # the commit has no embedding, which this Gaugeblock's catalog has
    now = (tmp_path / "kernels" / "_embedding.py").read_text()
    (tmp_path / "kernels" / "_embedding.py").unlink()
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-qm", "a state"]):
        subprocess.run([*me, *arguments], cwd=tmp_path, check=True)
    (tmp_path / "kernels" / "_embedding.py").write_text(now)
    subprocess.run([*me, "add", "."], cwd=tmp_path, check=True)
    gate_trials.plant(tmp_path, 2.0)
    ran = gaugeblock("compare", "--gate", "HEAD", "layer_norm", "embedding", "--direction", "fwd",
                     "--no-check", "--false-alarm", "0.2", "--json", "out.json",
                     cwd=tmp_path, PYTHONPATH=str(tmp_path))  # fmt: skip
    assert ran.returncode == 1, ran.stderr
    found = json.loads((tmp_path / "out.json").read_text())
    lines = {line["op"]: line for line in found["lines"]}
    assert lines["layer_norm"]["verdict"] == SLOWER
    assert 1.5 < lines["layer_norm"]["ratio"] < 6  # 3, in few runs beside other tests
    assert lines["embedding"]["verdict"] == NEW
    assert lines["embedding"]["reason"] == "A has no embedding"
    assert found["about"]["B"].endswith("with changes")


def test_cases_are_chosen_by_name():
    def keys(*cases):
        found = commits._keys(["layer_norm"], "full", "cuda", ("bfloat16",), ("fwd",), cases)
        return [key[1] for key in found]

    assert len(keys()) > 2
    assert keys(keys()[1]) == [keys()[1]]


def test_long_calls_are_timed_fewer_times():
    timed = object.__new__(side.Side)
    timed.setting = side.Setting("a", "b", ".", "gaugeblock", "cpu")
    timed.clock, timed.number = timing.clock("cpu"), 0
    for seconds, want in ((0.03, 2), (0.2, 1), (0.0, 4)):
        timed.contender = SimpleNamespace(run=lambda number, s=seconds: time.sleep(s))
        found = timed.time(4, 0.04)
        assert len(found) == want
        assert min(found) >= 1e3 * seconds


PROVIDER = """
import time
import torch
from gaugeblock.benchmarks.providers import Provider


def layer_norm(x, w, b, eps=1e-5):
    start = time.perf_counter()
    y = torch.nn.functional.layer_norm(x, x.shape[-1:], w, b, eps) + {error}
    if {slower}:
        # three times as long, all that is timed: to be seen beside other tests
        end = time.perf_counter() + 2 * (time.perf_counter() - start)
        while time.perf_counter() < end:
            pass
    return y


mine = Provider("mine", "1", {{"layer_norm": layer_norm}})
"""


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """commit(slower=…, error=…) in a repository that is the working folder."""
    folder = tmp_path / "theirs"
    folder.mkdir()
    monkeypatch.chdir(folder)

    def git(*arguments):
        me = ("-c", "user.name=n", "-c", "user.email=e@localhost")
        subprocess.run(["git", *me, *arguments], check=True, capture_output=True)

    def write(slower=False, error=0.0):
        (folder / "bench_mine.py").write_text(PROVIDER.format(slower=slower, error=error))

    def commit(**changes):
        write(**changes)
        git("add", ".")
        git("commit", "--allow-empty", "-m", "a state")

    git("init")
    commit.write, commit.git = write, git
    return commit


def changed_provider(old, new):
    """Side B, not committed."""
    text = Path("bench_mine.py").read_text()
    assert old in text
    Path("bench_mine.py").write_text(text.replace(old, new))


GATE = (
    "compare", "--gate", "HEAD~1", "layer_norm", "--provider", "bench_mine:mine",
    "--direction", "fwd",
)  # fmt: skip


def gate(*options):
    """(exit code, {direction: line})."""
    Path("out.json").unlink(missing_ok=True)
    # five runs can tell, where one in five may be a false alarm
    with pytest.raises(SystemExit) as exit:
        main([*GATE, "--false-alarm", "0.2", "--change", "0.2", "--json", "out.json", *options])
    found = json.loads(Path("out.json").read_text())
    return exit.value.code, {line["direction"]: line for line in found["lines"]}, found


def test_a_commit_that_is_slower_is_found(repository):
    repository()
    repository(slower=True)
    code, lines, found = gate("--no-check")
    assert (code, lines["fwd"]["verdict"]) == (1, SLOWER)
    assert 1.5 < lines["fwd"]["ratio"] < 6  # 3, in five runs beside other tests
    assert lines["fwd"]["runs"][0] == len(lines["fwd"]["log_ratios"]) >= 5
    assert found["about"]["A"].startswith("HEAD~1, ")
    # nothing of it stays
    listed = subprocess.run(["git", "worktree", "list"], capture_output=True, text=True).stdout
    assert listed.count("\n") == 1


def test_changes_that_are_not_committed_are_side_b(repository):
    repository()
    repository()
    repository.write(slower=True)
    code, lines, found = gate("--no-check")
    assert (code, lines["fwd"]["verdict"]) == (1, SLOWER)
    assert found["about"]["B"].endswith("with changes")


def test_nothing_that_is_wrong_is_timed(repository):
    repository()
    repository(error=1.0)
    code, lines, found = gate()
    assert (code, lines["fwd"]["verdict"]) == (1, WRONG)
    assert lines["fwd"]["reason"].startswith("B: ")
    assert found["about"]["checked"] == "what is timed is right on both sides"


def test_a_wrong_gradient_is_wrong(repository):
    repository()
    twice = "    y.requires_grad and y.register_hook(lambda g: 2 * g)\n    return"
    changed_provider("    return", twice)
    for direction in ("both", "bwd"):
        code, lines, _ = gate("--gate", "HEAD", "--direction", direction)
        assert (code, lines["bwd"]["verdict"]) == (1, WRONG)
        assert "dx" in lines["bwd"]["reason"]


def test_libraries_of_the_sides_wait_without_spinning(repository, monkeypatch):
    for name in commits._ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    repository()
    demand = (
        "    import os\n    assert os.environ['OMP_WAIT_POLICY'] == 'PASSIVE'\n    start = time"
    )
    changed_provider("    start = time", demand)
    _, lines, _ = gate("--no-check", "--gate", "HEAD")
    assert lines["fwd"]["verdict"] != WRONG
    assert not {*commits._ENVIRONMENT} & {*os.environ}


def test_a_side_that_dies_is_a_line_and_no_end(repository):
    repository()
    changed_provider("    start = time", "    import os; os._exit(3)\n    start = time")
    for options in ((), ("--no-check",)):
        code, lines, _ = gate(*options, "--gate", "HEAD")
        assert (code, lines["fwd"]["verdict"]) == (1, WRONG)
        assert lines["fwd"]["reason"] == "the process of B died"


def test_a_commit_that_repairs_a_case_has_nothing_to_be_compared_with(repository):
    repository(error=1.0)
    repository()
    for options, want in (((), 1), (("--accept-new",), 0)):
        code, lines, _ = gate(*options)
        assert (code, lines["fwd"]["verdict"]) == (want, NEW)
        assert lines["fwd"]["reason"].startswith("A: Refused: wrong")
    # where both are wrong, B is
    code, lines, _ = gate("--gate", "HEAD~1", "--accept-new")
    repository(error=1.0)
    assert lines["fwd"]["verdict"] == NEW
    code, lines, _ = gate("--gate", "HEAD~2", "--accept-new")
    assert (code, lines["fwd"]["verdict"]) == (1, WRONG)


def test_a_broken_device_costs_its_process_and_no_other_case(repository):
    repository()
    # on a device that is broken every later call fails, too
    changed_provider(
        "\n\ndef layer_norm",
        """
broken = False


def fault(gradient):
    global broken
    broken = True
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


def layer_norm""",
    )
    changed_provider("    start = time", "    if broken:\n        fault(0)\n    start = time")
    changed_provider("    return", "    y.requires_grad and y.register_hook(fault)\n    return")
    code, lines, _ = gate("--no-check", "--gate", "HEAD", "--direction", "both", "--seed", "1")
    assert (code, lines["bwd"]["verdict"]) == (1, WRONG)
    assert "illegal memory access" in lines["bwd"]["reason"]
    assert lines["fwd"]["verdict"] not in (WRONG, CUT)


def test_a_side_that_hangs_is_slow_and_not_wrong(repository, monkeypatch):
    repository()
    changed_provider("    start = time", "    time.sleep(60)\n    start = time")
    monkeypatch.setattr(commits, "_PATIENCE_S", 8)
    start = time.monotonic()
    code, lines, _ = gate("--no-check", "--gate", "HEAD")
    assert (code, lines["fwd"]["verdict"]) == (2, CUT)
    assert lines["fwd"]["reason"] == "B has not answered for 8 s"
    # it is not asked again
    assert time.monotonic() - start < 20


def test_checks_leave_time_for_timing(repository):
    repository()
    code, lines, _ = gate("--gate", "HEAD", "--budget-s", "0.01")
    assert (code, lines["fwd"]["verdict"], lines["fwd"]["runs"]) == (2, CUT, [0, 0])
    assert lines["fwd"]["reason"] == "the time budget was spent"


def test_a_case_is_compared_once(repository):
    repository()
    repository(slower=True)
    _, _, found = gate("--no-check", "--dtype", "float32", "--dtype", "float32", "layer_norm")
    assert len(found["lines"]) == 1


def test_what_is_installed_in_the_repository_is_not_the_repositorys(tmp_path, monkeypatch):
    module = ModuleType("a_dependency")
    module.__file__ = str(tmp_path / "theirs" / ".venv" / "lib" / "a_dependency.py")
    monkeypatch.setitem(sys.modules, "a_dependency", module)
    folders = str(tmp_path / "a"), str(tmp_path / "theirs")
    setting = side.Setting(*folders, ".", "bench_mine:mine", "cpu")
    with pytest.raises(side.Elsewhere, match="a_dependency must come from the worktree"):
        side._expect_from_worktree(setting)
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "theirs" / ".venv"))
    side._expect_from_worktree(setting)


def test_our_kernels_come_from_the_worktree(tmp_path):
    importlib.import_module("gaugeblock.kernels")
    for folder in (CHECKOUT, tmp_path):
        setting = side.Setting(str(folder), str(CHECKOUT), ".", "gaugeblock", "cpu")
        expected = pytest.raises(side.Elsewhere, match=r"gaugeblock\.kernels")
        with expected if folder == tmp_path else contextlib.nullcontext():
            side._expect_from_worktree(setting)


@pytest.mark.parametrize("wrong", [False, True])
@pytest.mark.parametrize("late", [False, True])
def test_what_the_provider_imports_comes_from_the_worktree_too(
    repository, monkeypatch, capsys, late, wrong
):
    """A helper in the repository, which an editable installation would offer to both sides."""
    repository()
    Path("lib").mkdir()
    Path("lib/timing_helper.py").write_text("")
    monkeypatch.syspath_prepend(str(Path("lib").absolute()))
    before = "    start = time" if late else "import torch\n"
    indent = before[: -len(before.lstrip())]
    changed_provider(before, f"{indent}import timing_helper\n{before}")
    if wrong:
        changed_provider("return y", "return 2 * y")
    for check in ("--check", "--no-check"):
        with pytest.raises(SystemExit) as exit:
            main([*GATE, check, "--gate", "HEAD"])
        assert exit.value.code == 2
        err = capsys.readouterr().err
        assert "timing_helper must come from the worktree, it came from" in err
        assert err.count("\n") == 1


def test_a_process_that_dies_as_it_starts_is_started_again(repository, tmp_path):
    flag = tmp_path / "died"
    repository()
    repository.write()
    died = f"""
import os, pathlib
if not pathlib.Path({str(flag)!r}).exists():
    pathlib.Path({str(flag)!r}).touch()
    os._exit(3)
"""
    Path("bench_mine.py").write_text(died + Path("bench_mine.py").read_text())
    _, lines, _ = gate("--no-check", "--gate", "HEAD")
    assert flag.exists()
    # timed, and as this gate may raise a false alarm, nothing is said of which verdict
    assert lines["fwd"]["verdict"] not in (WRONG, CUT)
    assert lines["fwd"]["runs"][0] >= 5


@pytest.mark.parametrize(("lacks", "verdict"), [("A", NEW), ("B", MISSING)])
def test_a_case_of_one_commit_alone_fails_unless_acknowledged(repository, lacks, verdict):
    for letter in "AB":
        repository.write()
        text = Path("bench_mine.py").read_text()
        if letter == lacks:
            text = text.replace('{"layer_norm": layer_norm}', "{}")
        Path("bench_mine.py").write_text(text)
        repository.git("add", ".")
        repository.git("commit", "-m", letter)
    for options, want in (
        ((), 1),
        (("--accept-new",), int(verdict == MISSING)),
        (("--accept-missing",), int(verdict == NEW)),
    ):
        code, lines, _ = gate(*options)
        assert (code, lines["fwd"]["verdict"]) == (want, verdict)
        assert lines["fwd"]["reason"].startswith(lacks)


@pytest.mark.parametrize(("lacks", "verdict"), [("A", NEW), ("B", MISSING)])
def test_a_provider_that_one_commit_lacks_has_new_or_missing_cases(repository, lacks, verdict):
    repository()
    for letter in "AB":
        repository.write()
        if letter == lacks:
            Path("bench_mine.py").unlink()
        repository.git("add", ".")
        repository.git("commit", "--allow-empty", "-m", letter)
    code, lines, _ = gate()
    assert (code, lines["fwd"]["verdict"]) == (1, verdict)
    assert lines["fwd"]["reason"] == f"{lacks} has no bench_mine"
    assert gate("--accept-new", "--accept-missing")[0] == 0


def test_what_no_commit_does_is_refused(repository, capsys):
    repository()
    for options, said in (
        (["--provider", "bench_min:mine"], "A has no bench_min and B has no bench_min"),
        (["ffn"], "A has no ffn and B has no ffn"),
        (["--direction", "bwd", "sample"], "ops must have cases of suite quick on cpu"),
    ):
        arguments = [*GATE, "--gate", "HEAD", *options]
        if options[-1] in ("ffn", "sample"):
            arguments.remove("layer_norm")
        with pytest.raises(SystemExit) as exit:
            main(arguments)
        assert exit.value.code == 2
        err = capsys.readouterr().err
        assert said in err
        assert err.count("\n") == 1


def test_what_the_time_does_not_suffice_for_is_cut_short(repository):
    repository()
    repository(slower=True)
    code, lines, _ = gate("--no-check", "--budget-s", "0.01")
    assert (code, lines["fwd"]["verdict"]) == (2, CUT)
    # one run was made, which shows a ratio and proves nothing
    assert lines["fwd"]["runs"] == [1, 1]
    assert lines["fwd"]["ratio"] == pytest.approx(math.exp(lines["fwd"]["log_ratios"][0]))
    assert (lines["fwd"]["low"], lines["fwd"]["high"]) == (None, None)


@pytest.mark.parametrize("has", ["{{}}", '{{"layer_norm": layer_norm}}'])
def test_a_copy_from_elsewhere_is_not_taken_for_the_worktrees(
    repository, monkeypatch, tmp_path, capsys, has
):
    repository()
    repository()
    # an old commit that had no such file
    repository.git("rm", "-q", "bench_mine.py")
    repository.git("commit", "-m", "none")
    repository()
    (tmp_path / "elsewhere").mkdir()
    text = PROVIDER.replace('{{"layer_norm": layer_norm}}', has)
    (tmp_path / "elsewhere" / "bench_mine.py").write_text(text.format(slower=False, error=0.0))
    monkeypatch.syspath_prepend(str(tmp_path / "elsewhere"))
    with pytest.raises(SystemExit) as exit:
        main([*GATE])
    assert exit.value.code == 2
    assert "bench_mine must come from the worktree" in capsys.readouterr().err
