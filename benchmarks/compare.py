"""`gaugeblock compare A B`: records of two states of the code, measured on one machine.

A side is a record, or a folder with the records of several runs below it. Only runs tell how much
the time of one and the same code moves from process to process, so both sides need five of them.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import numpy as np

from .providers import OURS
from .record import NAME, load_record
from .significance import LEAST_RUNS, UNKNOWN, unpaired
from .verdicts import CUT, MISSING, NEW, WRONG, Comparison, Line
from .words import shape_words

CHANGE, FALSE_ALARM = 0.03, 0.01
# what must be equal for times to be comparable
_OF_THE_MACHINE = ("device", "driver", "torch", "triton")
_BUDGET = "time budget"


def compare(
    a, b, *, change=CHANGE, false_alarm=FALSE_ALARM, normalise=False,
    accept_new=False, accept_missing=False, provider=OURS,
):  # fmt: skip
    """The comparison of two sides, each a path.

    change:      the smallest change that matters, as 0.03.
    false_alarm: how often two equal sides may be called different in any case.
    normalise:   divide each time by what its own run's ceilings allow, so that sides of different
                 devices or versions can be compared.
    accept_new, accept_missing: cases that one side alone has are no failure.
    provider:    whose times.
    Raises ValueError for what is no record, and for sides that are not comparable.
    """
    expect_rates(change, false_alarm)
    a, b = (_Side(path, provider, normalise) for path in (a, b))
    if not normalise:
        _expect_one_machine([*a.records, *b.records])
    if not a.times and not b.times:
        raise ValueError(f"compare: records must hold times of {provider}, they hold none")
    keys = sorted({*a.times, *b.times, *b.wrong, *a.cut, *b.cut})
    level = false_alarm / len(keys)
    accepted = {NEW: accept_new, MISSING: accept_missing}
    lines = [_line(key, a, b, level, change, accepted) for key in keys]
    about = {"A": a.words(), "B": b.words()} | _where(a.records[0], normalise)
    return Comparison(lines, change, false_alarm, about, "× roof" if normalise else "ms")


def expect_rates(change, false_alarm):
    for name, value in (("change", change), ("false-alarm", false_alarm)):
        if not 0 < value < 1:
            raise ValueError(f"compare: {name} must lie between 0 and 1, got {value}")


class _Side:
    """The runs of one side. A key is (op, case, dtype, direction).

    times:  {key: [median of each run that has it]}, without what was wrong in any run.
    wrong:  {key: what was wrong}.
    cut:    keys that no run has a time of, at least one of them for want of time.
    shapes: {key: in words}.
    """

    def __init__(self, path, provider, normalise):
        files = _files(Path(path))
        self.path, self.records = path, [load_record(file) for file in files]
        _expect_runs(path, files, self.records)
        self.state = _state_of(path, self.records, provider)
        self.times, self.wrong, self.shapes = defaultdict(list), {}, {}
        # what each record says of a case that it has no time of
        self.reasons = [{} for _ in self.records]
        for record, reasons in zip(self.records, self.reasons):
            for entry in record["entries"]:
                if entry["provider"] == provider:
                    self.times[_key(entry)].append(_time(entry, normalise, path))
                    self.shapes[_key(entry)] = shape_words(entry["shape"])
            for left in record["left_out"]:
                if left["provider"] in (None, provider):
                    reasons[_key(left)] = left["reason"]
                    if left.get("refused"):
                        self.wrong[_key(left)] = left["reason"]
        for key in self.wrong:
            self.times.pop(key, None)
        named = {key for reasons in self.reasons for key in reasons} - {*self.times, *self.wrong}
        self.cut = {key for key in named if self.absence(key)[0]}

    def absence(self, key):
        """(whether nothing but time was lacking, the reason) for a case without times."""
        if key in self.wrong:
            return False, self.wrong[key]
        found = []
        for record, reasons in zip(self.records, self.reasons):
            reason = reasons.get(key, "" if record["complete"] else "the record is not complete")
            unknown = key not in reasons and not record["complete"]
            found.append((unknown or _BUDGET in reason, reason))
        # one run that had the time and has no such case settles it
        return min(found)

    def words(self):
        runs = len(self.records)
        return f"{self.path}, {runs} run{'s' if runs > 1 else ''} of {self.state}"


def _expect_runs(path, files, records):
    for i, record in enumerate(records):
        if record in records[:i]:
            raise ValueError(
                f"compare: {path} must hold runs, got one twice: {files[records.index(record)]} "
                f"and {files[i]}"
            )


def _state_of(path, records, provider):
    """The commit of all runs, in words."""
    states = [_state(record, provider) for record in records]
    found = {
        (state["commit"] or "unknown commit")[:12] + (" with changes" if state["dirty"] else "")
        for state in states
    }
    if len(found) > 1:
        raise ValueError(
            f"compare: {path} must hold runs of one commit, got {' and '.join(sorted(found))}; "
            "give a folder of each"
        )
    return found.pop()


def _state(record, provider):
    """What holds "commit" and "dirty" of a provider: what is said of it, or else the record."""
    own = record["providers"].get(provider, {})
    return own if "commit" in own else record


def _files(path):
    """A record, or all below a folder."""
    if not path.is_dir():
        return [path]
    found = sorted(path.rglob(NAME))
    if not found:
        raise ValueError(f"compare: {path} must hold a {NAME}, it holds none; see bench --out")
    return found


def _key(entry):
    return entry["op"], entry["case"], entry["dtype"], entry["direction"]


def _time(entry, normalise, path):
    if not normalise:
        return entry["time_ms"]["p50"]
    if not entry["roof_ms"]:
        raise ValueError(f"compare: {path} must hold ceilings to be normalised by, it holds none")
    return entry["time_ms"]["p50"] / entry["roof_ms"]


def _expect_one_machine(records):
    for name in _OF_THE_MACHINE:
        _expect_one(name, {record[name] for record in records})
    for name in ("cores", "threads"):
        _expect_one(name, {record["machine"].get(name) for record in records})


def _expect_one(name, values):
    if len(values) > 1:
        said = " and ".join(sorted(map(str, values)))
        raise ValueError(
            f"compare: {name} must be one, got {said}; measure both sides on one machine, or give "
            "--normalise"
        )


def _where(record, normalise):
    if normalise:
        return {"times": "over their ceilings'"}
    versions = [f"{name} {record[name]}" for name in ("torch", "triton") if record[name]]
    return {"device": record["device"], "versions": ", ".join(versions)}


def _line(key, a, b, level, change, accepted):
    times = [side.times.get(key, []) for side in (a, b)]
    if key in b.wrong:
        return Line(*key, WRONG, reason=b.wrong[key])
    if not all(times):
        return _one_sided(key, a, b, accepted)
    if a.shapes[key] != b.shapes[key]:
        reason = f"another case of this name: {a.shapes[key]} in A, {b.shapes[key]} in B"
        return Line(*key, NEW, reason=reason, accepted=accepted[NEW])
    middle, runs = [float(np.median(side)) for side in times], tuple(map(len, times))
    found = {"a": middle[0], "b": middle[1], "runs": runs}
    if min(runs) < LEAST_RUNS:
        reason = f"needs {LEAST_RUNS} runs a side; bench --out DIR/1, DIR/2 …, then compare folders"
        ratio = float(np.exp(np.mean(np.log(times[1])) - np.mean(np.log(times[0]))))
        return Line(*key, UNKNOWN, ratio=ratio, reason=reason, **found)
    return line_of(key, unpaired(*times, level), change, **found)


def line_of(key, interval, change, **found):
    """A line with the verdict of an interval; an end that is none is None."""
    verdict = interval.verdict(change)
    low, high = interval.low or None, None if np.isinf(interval.high) else interval.high
    if verdict == UNKNOWN:
        found["reason"] = "the interval is too wide: more runs, or a quieter machine"
    return Line(*key, verdict, ratio=interval.ratio, low=low, high=high, **found)


def _one_sided(key, a, b, accepted):
    """A case that one side alone has a time of, or neither."""
    verdict, letter, lacks = (NEW, "A", a) if key in b.times else (MISSING, "B", b)
    if key not in a.times and key not in b.times:
        lacks = b if key in b.cut else a
    cut, reason = lacks.absence(key)
    if cut:
        return Line(*key, CUT, reason=reason)
    reason = f"not in {letter}" + (f": {reason}" if reason else "")
    return Line(*key, verdict, reason=reason, accepted=accepted[verdict])
