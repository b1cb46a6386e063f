"""`compare --gate` with invented sides and clock: looks, budget, what a lost run costs."""

import contextlib
import math

import numpy as np
import pytest
from gaugeblock.benchmarks import commits
from gaugeblock.benchmarks.commits import LOOKS, SideError, _Gate
from gaugeblock.benchmarks.significance import SAME, SLOWER, UNKNOWN, least_pairs
from gaugeblock.benchmarks.verdicts import CUT, MISSING, NEW, WRONG

CHANGE, FALSE_ALARM = 0.03, 0.01


class Sides:
    """Two sides on a clock of their own.

    slower:     {key: B's time over A's}, 1 by default.
    dies:       dies(run, letter, nth prepared of the run) -> whether the process ends there.
    prepare_s, check_s: what they take.
    wrong:      {key: letters of the sides that are}.
    noise:      {key: its standard deviation}, a thousandth by default.
    """

    def __init__(self, monkeypatch, slower=None, dies=lambda *_: False, prepare_s=0.0,
                 check_s=0.0, wrong=None, noise=None):  # fmt: skip
        self.slower, self.dies, self.wrong = slower or {}, dies, wrong or {}
        self.noise = noise or {}
        self.prepare_s, self.check_s = prepare_s, check_s
        self.now, self.opened = 0.0, 0
        self.rng = np.random.default_rng(0)
        monkeypatch.setattr(commits.time, "monotonic", lambda: self.now)

    @contextlib.contextmanager
    def open(self, rng):
        self.opened += 1
        yield [Worker(self, "A"), Worker(self, "B")]


class Worker:
    def __init__(self, sides, letter):
        self.sides, self.letter, self.died, self.prepared = sides, letter, False, 0

    def ask(self, method, *arguments):
        self.send(method, *arguments)
        return self.answer()

    def send(self, method, *arguments):
        assert not self.died, "a process that died is asked"
        self.asked = method, arguments

    def answer(self):
        method, arguments = self.asked
        return getattr(self, method)(*arguments)

    def cannot(self, keys):
        return dict.fromkeys(keys)

    def check(self, key, backward):
        self.sides.now += self.sides.check_s / 2
        if self.letter in self.sides.wrong.get(key, ""):
            raise SideError(self.letter, f"{self.letter}: wrong")

    def prepare(self, key):
        self.sides.now += self.sides.prepare_s / 2
        self.key, self.prepared = key, self.prepared + 1
        if self.sides.dies(self.sides.opened, self.letter, self.prepared):
            self.died = True
            raise SideError(self.letter, f"the process of {self.letter} died", died=True)

    def time(self, calls, budget_s):
        ms = self.sides.slower.get(self.key, 1.0) if self.letter == "B" else 1.0
        return ms * np.exp(self.sides.rng.normal(0, self.sides.noise.get(self.key, 1e-3), calls))

    def release(self):
        self.key = None


def keys(n):
    return [("layer_norm", f"case{i}", "float32", "fwd") for i in range(n)]


def fewest(n):
    return least_pairs(FALSE_ALARM / (n * len(LOOKS)))


def run(sides, n, budget_s=1e9, check=False):
    """({number of the case: its line}, what was said)."""
    said = []
    accepted = {NEW: False, MISSING: False}
    rng = np.random.default_rng(1)
    gate = _Gate(sides, rng, CHANGE, FALSE_ALARM, accepted, budget_s, said.append)
    lines = gate.run(keys(n), check)
    assert len(lines) == n
    return {int(line.case[4:]): line for line in lines}, said


def test_what_can_be_told_is_finished_at_the_first_look(monkeypatch):
    sides = Sides(monkeypatch, slower={keys(3)[1]: 1.05})
    lines, said = run(sides, 3)
    assert [lines[i].verdict for i in range(3)] == [SAME, SLOWER, SAME]
    assert {line.runs for line in lines.values()} == {(fewest(3), fewest(3))}
    assert said == [f"{fewest(3)} runs: 3 of 3 cases told"]
    assert lines[1].ratio == pytest.approx(1.05, rel=1e-3)


def test_what_cannot_be_told_has_all_five_looks(monkeypatch):
    lines, said = run(Sides(monkeypatch, noise={keys(2)[0]: 1.0}), 2)
    assert (lines[0].verdict, lines[1].verdict) == (UNKNOWN, SAME)
    looks = [math.ceil(share * fewest(2)) for share in LOOKS]
    assert [line.split(":")[0] for line in said] == [f"{number} runs" for number in looks]
    assert all(line.endswith("1 of 2 cases told") for line in said)
    assert (lines[0].runs[0], lines[1].runs[0]) == (looks[-1], looks[0])


def test_a_run_that_is_lost_costs_a_case_no_verdict(monkeypatch):
    # whichever comes first in the second run ends its process; what comes after goes on in the next
    sides = Sides(monkeypatch, dies=lambda run, letter, nth: (run, letter, nth) == (3, "B", 1))
    lines, said = run(sides, 2)
    assert sorted(line.verdict for line in lines.values()) == [SAME, WRONG]
    (good,) = (line for line in lines.values() if line.verdict == SAME)
    assert good.runs[0] >= fewest(2)
    assert said[0] == f"{fewest(2)} runs: 1 of 2 cases told"


def test_a_case_that_had_no_turn_is_cut(monkeypatch):
    # the first case of the first run ends its process, and with that the time is over
    dies = Sides(monkeypatch, dies=lambda run, letter, nth: run == 2, prepare_s=1.0)
    lines, _ = run(dies, 2, budget_s=0.5)
    assert sorted(line.verdict for line in lines.values()) == [CUT, WRONG]
    (cut,) = (line for line in lines.values() if line.verdict == CUT)
    assert (cut.runs, cut.reason) == ((0, 0), "the time budget was spent")


def test_a_side_that_dies_first_in_a_does_not_make_b_wrong(monkeypatch):
    sides = Sides(monkeypatch, dies=lambda run, letter, nth: (run, letter) == (2, "A"))
    lines, _ = run(sides, 1)
    assert lines[0].verdict == NEW
    both = Sides(monkeypatch, dies=lambda run, letter, nth: run == 2)
    lines, _ = run(both, 1)
    assert (lines[0].verdict, lines[0].reason) == (WRONG, "the process of B died")


@pytest.mark.parametrize("check", [False, True])
def test_cases_that_do_not_fit_are_cut_from_the_end(monkeypatch, check):
    n = 4
    # what has been checked has been compiled: the first run tells, else the second
    typical = 1 if check else 2
    budget_s = typical * n + 2.5 * (fewest(n) - typical)
    lines, _ = run(Sides(monkeypatch, prepare_s=1.0), n, budget_s, check)
    assert [lines[i].verdict for i in range(n)] == [SAME, SAME, CUT, CUT]
    assert {lines[i].runs for i in (2, 3)} == {(typical, typical)}
    assert {lines[i].reason for i in (2, 3)} == {"the time budget was spent"}


def test_checks_take_half_of_the_time_at_most(monkeypatch):
    # 3 s each of 14: the third begins before the half, the fourth does not
    sides = Sides(monkeypatch, check_s=3.0, wrong={keys(4)[1]: "B", keys(4)[2]: "A"})
    lines, _ = run(sides, 4, 14.0, check=True)
    assert [lines[i].verdict for i in range(4)] == [SAME, WRONG, NEW, CUT]
    assert lines[3].runs == (0, 0)


def test_the_level_is_shared_by_cases_and_looks(monkeypatch):
    assert fewest(64) > fewest(1)
    lines, _ = run(Sides(monkeypatch), 64)
    assert {line.runs[0] for line in lines.values()} == {fewest(64)}
